"""Where a fit begins: a rotation that lines up linear parts, and a small gain.

The error is not convex in the adapter. A start that moves the target expert's input too far ends
above the best constant output, so the gain is raised from a tenth of the spread of the target's
inputs only until the outputs have the wanted small spread.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import layer_norm

from moescope.alignment.stack import AdapterStack, ExpertStack
from moescope.alignment.whitening import Whitening

_TOKENS = 1_024  # of the target's inputs, enough to see where they lie
_FEW = 256  # of the source's tokens, enough to see the size of outputs
_RIDGE = 0.01  # on white coordinates
_GAINS = [0.1 * 10 ** (step / 6) for step in range(13)]  # times the spread of the target's inputs


@dataclass(frozen=True, eq=False)
class Domain:
    """Where the inputs of a target expert lie."""

    inputs: Float[Tensor, "tokens hidden"]
    """A sample of them."""
    whitening: Whitening
    """Their white coordinates."""

    @classmethod
    def of(
        cls,
        inputs: Float[Tensor, "tokens hidden"],
        shrinkage: float,
        generator: torch.Generator,
    ) -> "Domain":
        """Learn it from inputs, of which at most 1,024 are used."""
        if len(inputs) > _TOKENS:
            chosen = torch.randperm(len(inputs), generator=generator)[:_TOKENS]
            inputs = inputs[chosen.to(inputs.device)]
        return cls(inputs.float(), Whitening.of(inputs, shrinkage))

    @classmethod
    def unknown(
        cls,
        source_inputs: Float[Tensor, "tokens hidden"],
        shrinkage: float,
        generator: torch.Generator,
    ) -> "Domain":
        """Stand-in where no inputs of the target are known: Gaussian, as large as the source's."""
        normal = torch.randn(_TOKENS, source_inputs.shape[1], generator=generator)
        size = source_inputs.square().mean().sqrt()
        return cls.of(normal.to(source_inputs.device) * size, shrinkage, generator)

    @property
    def scale(self) -> Float[Tensor, ""]:
        """Root mean square distance from the mean, per dimension."""
        return (self.inputs - self.whitening.mean).square().mean().sqrt().clamp_min(1e-6)


def linear_part(
    white: Float[Tensor, "tokens hidden"], y: Float[Tensor, "tokens hidden"]
) -> Float[Tensor, "hidden hidden"]:
    """The matrix M of the ridge fit `y - mean(y) = white @ M`."""
    eye = torch.eye(white.shape[1], device=white.device)
    gram = white.T @ white / len(white) + _RIDGE * eye
    found: Tensor = torch.linalg.solve(gram, white.T @ (y - y.mean(0)) / len(white))
    return found


def rotations(
    source: Float[Tensor, "hidden hidden"], experts: ExpertStack, domains: Sequence[Domain]
) -> Float[Tensor, "fits hidden hidden"]:
    """For every target, the rotation that best carries its linear part to the source's.

    Args:
        source: Linear part of the source expert in its white coordinates.
        experts: The targets.
        domains: Where the inputs of each lie.

    Returns:
        The orthogonal polar factor of the ridge solution P of `P L = source`, L being the
        target's linear part, turned to [out, in].
    """
    found = []
    for i, domain in enumerate(domains):
        outputs = experts.keep(torch.tensor([i]))(domain.inputs[None])[0]
        linear = linear_part(domain.whitening(domain.inputs), outputs)
        gram = linear @ linear.T  # [hidden, hidden]
        level = gram.diagonal().mean().clamp_min(1e-20)
        eye = torch.eye(len(gram), device=gram.device)
        pulled = torch.linalg.solve(gram / level + 0.1 * eye, linear @ source.T / level)
        found.append(domain.whitening.inverse @ pulled)  # [target input, source white]
    left, _, right = torch.linalg.svd(torch.stack(found), full_matrices=False)
    rotation: Tensor = left @ right
    return rotation


def start(
    white: Float[Tensor, "tokens hidden"],
    y: Float[Tensor, "tokens hidden"],
    experts: ExpertStack,
    domains: Sequence[Domain],
    wanted_output: float,
) -> tuple[AdapterStack, Float[Tensor, "fits 1"]]:
    """First adapters on white inputs.

    Args:
        white: Source inputs in white coordinates.
        y: Outputs of the source expert.
        experts: The targets.
        domains: Where the inputs of each lie.
        wanted_output: Spread of the target's outputs, as a share of the spread of `y`.

    Returns:
        The adapters, and the scale of each one's gain.
    """
    weight = rotations(linear_part(white, y), experts, domains)
    shift = torch.stack([domain.whitening.mean for domain in domains])
    scale = torch.stack([domain.scale for domain in domains])[:, None]  # [fits, 1]
    few = white[:_FEW].expand(len(weight), -1, -1)
    normal = layer_norm(torch.bmm(few, weight.mT), shift.shape[-1:])
    limit = wanted_output**2 * (y - y.mean(0)).square().sum(1).mean()
    chosen = torch.full_like(scale, _GAINS[0])
    for gain in _GAINS[1:]:
        outputs = experts(normal * (gain * scale[:, None]) + shift[:, None])
        spread = (outputs - outputs.mean(1, keepdim=True)).square().sum(2).mean(1)[:, None]
        chosen = torch.where(spread <= limit, torch.full_like(scale, gain), chosen)
    gain_scale = chosen * scale
    adapters = AdapterStack(
        weight=weight,
        bias=torch.zeros_like(shift),
        gain=gain_scale.expand_as(shift).clone(),
        shift=shift.clone(),
    )
    return adapters, gain_scale
