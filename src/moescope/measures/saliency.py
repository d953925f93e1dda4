"""How much the experts of a layer matter, by the tokens that the router sent to them.

For expert e with the tokens t routed to it, output f_e and the weights w as the layer used them:

    frequency             number of t
    EAN                   sum over t of ||f_e(x_t)||; or their mean
    router-weighted norm  sum over t of w_te ||f_e(x_t)||
    REAP                  mean over t of w_te ||f_e(x_t)||

Lasby et al. 2025, arXiv 2510.13999. Only outputs of routed tokens enter, so no others are computed.
Where a layer's weights scale the inputs of its experts, `||f_e(w_te x_t)||` takes the place of
`w_te ||f_e(x_t)||`: pass these norms, and weights of one.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor


@dataclass(frozen=True, eq=False, kw_only=True)
class Saliency:
    """Sums over the tokens routed to each expert; those of several batches add up: `one + other`.

    All measures of an expert without tokens are 0: it did nothing on this text.
    """

    frequency: Int64[Tensor, " experts"]
    """Tokens that used the expert."""
    ean: Float64[Tensor, " experts"]
    """Sum of the norms of its outputs."""
    weighted_norm: Float64[Tensor, " experts"]
    """Sum of the norms of its outputs, each times the routing weight."""

    @classmethod
    def of(
        cls,
        experts: Int64[Tensor, "tokens top_k"],
        weights: Float[Tensor, "tokens top_k"],
        norms: Float[Tensor, "tokens top_k"],
        num_experts: int,
    ) -> "Saliency":
        """Sum up one batch, in fp64 on the CPU.

        Args:
            experts: The experts used; -1 where a slot was not used, which never counts.
            weights: The weights that the layer gave to their outputs.
            norms: Norms of their outputs before these weights, see `routed_norms`.
            num_experts: Number of experts of the layer.
        """
        used = (experts >= 0) & (weights != 0)
        chosen = experts[used].cpu()
        norm, weight = norms[used].cpu().double(), weights[used].cpu().double()
        return cls(
            frequency=chosen.bincount(minlength=num_experts),
            ean=chosen.bincount(norm, num_experts).double(),
            weighted_norm=chosen.bincount(weight * norm, num_experts).double(),
        )

    @property
    def mean_norm(self) -> Float64[Tensor, " experts"]:
        """EAN as a mean: norm of the output per token that used the expert."""
        return self.ean / self.frequency.clamp_min(1)

    @property
    def reap(self) -> Float64[Tensor, " experts"]:
        """REAP: router-weighted norm of the output per token that used the expert."""
        return self.weighted_norm / self.frequency.clamp_min(1)

    def __add__(self, other: "Saliency") -> "Saliency":
        return Saliency(
            frequency=self.frequency + other.frequency,
            ean=self.ean + other.ean,
            weighted_norm=self.weighted_norm + other.weighted_norm,
        )


def routed_norms(
    x: Float[Tensor, "tokens hidden"],
    experts: Int64[Tensor, "tokens top_k"],
    outputs: Callable[[int, Tensor], Tensor],
) -> Float[Tensor, "tokens top_k"]:
    """Norms of the outputs of the experts that each token used, in fp32; 0 in slots not used.

    Args:
        x: Inputs of the block.
        experts: The experts used; -1 where a slot was not used.
        outputs: `outputs(expert, rows)` of [rows, hidden] inputs; asked once per expert in use,
            for the tokens that used it.
    """
    top_k = experts.shape[1]
    slots = experts.flatten().argsort(stable=True)  # those of one expert side by side
    counts = (experts.flatten() + 1).bincount()  # slots not used, then those of expert 0, 1, ...
    norms = torch.zeros(experts.numel(), device=x.device)
    for expert, own in enumerate(slots.tensor_split(counts.cumsum(0).cpu()), start=-1):
        if expert >= 0 and len(own):
            norms[own] = outputs(expert, x[own // top_k]).float().norm(dim=-1)
    return norms.view_as(experts)
