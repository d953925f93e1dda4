"""Where inputs lie, and the coordinates in which adapters are trained."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from moescope.alignment.whitening import Whitening
from moescope.experts.adapter import Form

_TOKENS = 1_024  # of the target's inputs, enough to see where they lie


@dataclass(frozen=True, eq=False)
class Domain:
    """Where the inputs of a target expert lie."""

    inputs: Float[Tensor, "tokens hidden"]
    """A sample of them."""
    whitening: Whitening
    """Their white coordinates."""
    known: bool = True
    """Whether they are the target's own, not a stand-in."""

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
        size = (source_inputs - source_inputs.mean(0)).square().mean().sqrt()
        domain = cls.of(normal.to(size.device) * size, shrinkage, generator)
        return replace(domain, known=False)

    @property
    def spread(self) -> Float[Tensor, " hidden"]:
        """Standard deviation of every dimension; of one that hardly moves, a little more."""
        return with_floor((self.inputs - self.whitening.mean).square().mean(0).sqrt())

    @property
    def scale(self) -> Float[Tensor, ""]:
        """Root mean square distance from the mean, per dimension."""
        return _size(self.inputs - self.whitening.mean)


def with_floor(deviations: Float[Tensor, " hidden"]) -> Float[Tensor, " hidden"]:
    """Standard deviations of all dimensions, a little more for one that hardly moves."""
    size = deviations.square().mean().sqrt().clamp_min(1e-6)
    return deviations.clamp_min(1e-3 * float(size))


def _size(centred: Float[Tensor, "tokens hidden"]) -> Float[Tensor, ""]:
    return centred.square().mean().sqrt().clamp_min(1e-6)


def coordinates(form: Form, inputs: Float[Tensor, "tokens hidden"], shrinkage: float) -> Whitening:
    """The coordinates of the source's inputs in which an adapter of this form is trained.

    White as far as the form can take them up afterwards: dimension by dimension with a diagonal
    matrix, by one factor for all dimensions with an orthogonal one. A free matrix could take up
    all of it, but gets half: with equal steps in all directions it learns by heart in those where
    the inputs hardly move.
    """
    if form in ("layer_norm", "linear"):
        return Whitening.in_part(inputs, shrinkage)
    if form == "orthogonal":
        mean = inputs.mean(0)
        scale = _size(inputs - mean)
        eye = torch.eye(len(mean), device=inputs.device)
        return Whitening(mean, eye / scale, eye * scale)
    return Whitening.by_dimension(inputs)
