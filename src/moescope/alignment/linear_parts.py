"""How experts answer to small changes of their input: the mean of their Jacobians."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from moescope.alignment.domains import with_floor
from moescope.alignment.samples import Samples
from moescope.alignment.stack import ExpertStack
from moescope.alignment.whitening import Whitening
from moescope.experts.weights import ExpertWeights

_TOKENS = 1_024  # enough for a mean
_RIDGE = 0.1  # on white coordinates


def mean_jacobians(
    experts: ExpertStack, inputs: Float[Tensor, "#fits tokens hidden"]
) -> Float[Tensor, "fits hidden hidden"]:
    """Mean derivative of every output by every input over the given tokens, [fits, in, out].

    A neuron `act(g) * u` changes by `act'(g) * u` with g and by `act(g)` with u: only the means of
    these numbers are needed, never the Jacobian of a single token.
    """
    inputs = inputs.expand(len(experts), -1, -1)
    with torch.enable_grad():
        parts = [part.detach().requires_grad_() for part in experts.before(inputs)]
        slopes = torch.autograd.grad(experts.neurons(*parts).sum(), parts)
    matrices = [experts.up] if experts.gate is None else [experts.gate, experts.up]
    read = torch.zeros_like(experts.up)
    for matrix, slope in zip(matrices, slopes, strict=True):
        read.addcmul_(matrix, slope.mean(1, keepdim=True))
    jacobians: Tensor = torch.bmm(read, experts.down)
    return jacobians


def regressed(
    white: Float[Tensor, "tokens hidden"], y: Float[Tensor, "tokens hidden"]
) -> Float[Tensor, "hidden hidden"]:
    """The matrix M, [in, out], of the ridge fit `y - mean(y) = white @ M`.

    For Gaussian inputs it estimates the mean Jacobian (Stein 1981).
    """
    eye = torch.eye(white.shape[1], device=white.device)
    gram = white.T @ white / len(white) + _RIDGE * eye
    found: Tensor = torch.linalg.solve(gram, white.T @ (y - y.mean(0)) / len(white))
    return found


@dataclass(frozen=True, eq=False)
class SourceLinear:
    """The linear part of the source expert, and the coordinates of its inputs."""

    jacobian: Float[Tensor, "hidden hidden"]
    """[in, out]: mean derivative of its outputs by its inputs."""
    spread: Float[Tensor, " hidden"]
    """Standard deviation of every dimension of its inputs."""
    white: Whitening
    """White coordinates of its inputs."""
    back: Float[Tensor, "hidden hidden"]
    """[plain, task]: takes inputs in the coordinates of the task to plain ones, without mean."""

    @classmethod
    def of(
        cls,
        train: Samples,
        coordinates: Whitening,
        source: ExpertWeights | None,
        shrinkage: float,
    ) -> "SourceLinear":
        """From the expert itself where it is known, by regression where it is not.

        Args:
            train: Its tokens, with plain inputs.
            coordinates: Those of the task.
            source: The expert.
            shrinkage: Of the covariance.
        """
        white = Whitening.of(train.inputs, shrinkage)
        if source is None:
            jacobian = white.matrix @ regressed(white(train.inputs), train.outputs)
        else:
            experts = ExpertStack.of([source], train.inputs.device)
            jacobian = mean_jacobians(experts, train.inputs[None, :_TOKENS])[0]
        spread = with_floor(train.inputs.std(0, correction=0))
        return cls(jacobian, spread, white, coordinates.inverse.mT)
