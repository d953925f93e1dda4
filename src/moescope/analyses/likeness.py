"""How well the experts of a model imitate one another behind adapters, all with all.

An FVU says how much of a source's outputs is missed, in units of their own spread. But some
sources are easy: a linear map without any expert imitates them well. So errors are compared as

    relative error of b for a = FVU of b behind its adapter for a / null of a
    null of a                 = FVU of the best linear map for a, at most 1, the constant
    distance of a and b       = the larger of the relative errors of b for a and of a for b

all on tokens set aside within the training documents. 0: each imitates the other without error.
1: one of them is imitated no better than without any expert.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float

from moescope.alignment.controls import linear_map
from moescope.alignment.held_out import HeldOut
from moescope.alignment.randomness import generator
from moescope.analyses.align.tokens import Tokens
from moescope.analyses.fits import Fits, Source, Target
from moescope.errors import CaptureError, OptionError
from moescope.models.view import MoEModel
from moescope.progress import track

_LEAST_NULL = 1e-3
"""Nulls below it count as it: such a source is a linear map."""
FEWEST = 4
"""Experts below which there is nothing to group."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Likeness:
    """Errors of every expert in the place of every other. Rows are sources, columns targets."""

    experts: Sequence[Source]
    """Those with enough tokens."""
    left_out: Sequence[Source]
    """Those without."""
    inner_fvu: Float[np.ndarray, "sources targets"]
    """FVU inside the training documents, to choose by; 0 for an expert in its own place."""
    fvu: Float[np.ndarray, "sources targets"]
    """FVU on the held-out documents."""
    null: Float[np.ndarray, " sources"]
    """Inner FVU of the best linear map without any expert, at most 1."""
    linear_fvu: Float[np.ndarray, " sources"]
    """FVU of the linear map on the held-out documents."""

    @classmethod
    def of(
        cls,
        fits: Fits,
        experts: Sequence[Source],
        random: int | None = None,
        fewest: int = FEWEST,
    ) -> "Likeness":
        """Fit what is missing, all experts with all.

        Args:
            fits: The adapters.
            experts: Who takes part.
            random: Take, in the place of every target, its random expert of this number, which
                has its down projection and nothing else of it. None: the targets themselves.
            fewest: Experts below which it is refused.

        Raises:
            OptionError: Too few experts take part.
            CaptureError: Too few of them have enough tokens, or the capture lacks inputs.
        """
        if len(experts) < fewest:
            raise OptionError(
                "too few experts take part",
                got=len(experts),
                expected=f"at least {fewest}",
                remedy="Choose more layers, or more experts per layer",
            )
        size = len(experts)
        inner, held_out = np.zeros((size, size)), np.zeros((size, size))
        null, linear = np.full(size, np.nan), np.full(size, np.nan)
        for i, source in enumerate(track(experts, "adapters: source experts")):
            targets = [Target(*expert, random) for expert in experts if expert != source]
            for target, fitted in fits.between(source, targets).items():
                j = experts.index(Source(target.layer, target.expert))
                inner[i, j], held_out[i, j] = fitted.inner_fvu, fitted.row["fvu"]
                linear[i] = fitted.row["fvu_linear"]
            if not np.isnan(inner[i]).any():
                null[i] = null_fvu(fits, source)
        there = ~np.isnan(null)
        if there.sum() < fewest:
            raise CaptureError(
                "too few experts have tokens enough for adapters",
                got=f"{int(there.sum())} of {size}",
                expected=f"at least {fewest}",
                remedy="Choose more, or capture more tokens, with a larger tokens_per_expert",
            )
        return cls(
            experts=[expert for expert, is_there in zip(experts, there, strict=True) if is_there],
            left_out=[e for e, is_there in zip(experts, there, strict=True) if not is_there],
            inner_fvu=inner[np.ix_(there, there)],
            fvu=held_out[np.ix_(there, there)],
            null=null[there],
            linear_fvu=linear[there],
        )

    def part(self, experts: Sequence[Source]) -> "Likeness":
        """That of some of them, in this order."""
        rows = [self.experts.index(expert) for expert in experts]
        return Likeness(
            experts=list(experts),
            left_out=[],
            inner_fvu=self.inner_fvu[np.ix_(rows, rows)],
            fvu=self.fvu[np.ix_(rows, rows)],
            null=self.null[rows],
            linear_fvu=self.linear_fvu[rows],
        )

    @cached_property
    def relative(self) -> Float[np.ndarray, "sources targets"]:
        """Inner FVU over the null of the source."""
        return np.asarray(self.inner_fvu / np.maximum(self.null, _LEAST_NULL)[:, None])

    @cached_property
    def distances(self) -> Float[np.ndarray, "experts experts"]:
        """The larger of the relative errors of both directions."""
        return distances_of(self.relative)


def distances_of(
    relative: Float[np.ndarray, "experts experts"],
) -> Float[np.ndarray, "experts experts"]:
    """The larger of the errors of both directions of each pair."""
    return np.asarray(np.maximum(relative, relative.T))


def null_fvu(fits: Fits, source: Source) -> float:
    """Inner FVU of the best linear map, fitted without the inner tokens, or 1 if that is less."""
    trained, inner = fits.inner(source)
    purpose = generator(fits.options.seed, str(source), "penalty of the null")
    fitted_on, aside = trained.split(fits.options.solver.inner_share, purpose)
    given = linear_map(fitted_on, aside)(inner.inputs)
    return min(1.0, HeldOut(inner, trained.outputs.mean(0)).fvu(given))


def tokens_by_expert(
    tokens: Tokens, experts: Sequence[Source], *, held_out: bool
) -> Mapping[Source, int]:
    """How many tokens of the training, or of the held-out, documents used each expert."""
    capture, found = tokens.capture, dict[Source, int]()
    for layer in sorted({expert.layer for expert in experts}):
        used = torch.zeros(capture.layer_facts(layer)["num_experts"], dtype=torch.int64)
        for where, routing in capture.routing_shards(layer):
            own = routing.experts[tokens.held_out[capture.documents[where]] == held_out].long()
            used += own[own >= 0].bincount(minlength=len(used))
        found |= {e: int(used[e.expert]) for e in experts if e.layer == layer}
    return found


def expert_parameters(model: MoEModel, experts: Sequence[Source]) -> int:
    """Numbers in all of them."""
    return sum(model.layer(e.layer).expert_weights(e.expert).num_parameters for e in experts)
