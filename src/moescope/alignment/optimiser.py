"""Muon for matrices, Adam for vectors, of many fits at once."""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from moescope.alignment.options import SolverOptions
from moescope.alignment.stack import AdapterStack

ROUNDS = 3
PRODUCTS = 3 * ROUNDS
"""Matrix products of one step's `newton_schulz`."""
_RETRACTIONS = 4  # rounds, each of which squares the distance to the orthogonal matrices


def newton_schulz(matrix: Float[Tensor, "fits rows columns"]) -> Float[Tensor, "fits rows columns"]:
    """Nearly the orthogonal polar factor: Muon's quintic iteration (Jordan et al. 2024).

    Three rounds do as well here as the usual five.
    """
    if matrix.shape[1] > matrix.shape[2]:  # the smaller of the two Gram matrices
        return newton_schulz(matrix.mT).mT
    x: Tensor = matrix / (matrix.norm(dim=(-2, -1), keepdim=True) + 1e-20)
    for _ in range(ROUNDS):
        gram = torch.bmm(x, x.mT)
        polynomial = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, polynomial, x, beta=3.4445)
    return x


def tangent(
    gradient: Float[Tensor, "fits hidden hidden"], weight: Float[Tensor, "fits hidden hidden"]
) -> Float[Tensor, "fits hidden hidden"]:
    """The part of `gradient` that keeps an orthogonal `weight` orthogonal, to first order."""
    turned = torch.bmm(weight.mT, gradient)
    return torch.bmm(weight, (turned - turned.mT) / 2)


def retract(weight: Float[Tensor, "fits hidden hidden"]) -> Float[Tensor, "fits hidden hidden"]:
    """The orthogonal matrix nearest to one that is nearly so (Newton-Schulz, cubic)."""
    for _ in range(_RETRACTIONS):
        weight = torch.baddbmm(weight, weight, torch.bmm(weight.mT, weight), beta=1.5, alpha=-0.5)
    return weight


class Optimiser:
    """Changes the tensors of an `AdapterStack` in place.

    Args:
        adapters: The fits, in the coordinates of their task.
        units: For every tensor of the adapters, what its steps are multiples of; fits come first.
        options: Rates.
    """

    def __init__(
        self, adapters: AdapterStack, units: Mapping[str, Tensor], options: SolverOptions
    ) -> None:
        self.adapters, self.units, self.options = adapters, dict(units), options
        self.first = {name: torch.zeros_like(t) for name, t in adapters.tensors().items()}
        self.second = {name: torch.zeros_like(t) for name, t in self.first.items() if t.ndim == 2}
        self.steps = 0

    def step(self, gradients: Sequence[Tensor], schedule: float) -> None:
        """One step of every tensor; `schedule` scales the rates."""
        self.steps += 1
        tensors = self.adapters.tensors()
        for (name, tensor), gradient in zip(tensors.items(), gradients, strict=True):
            if tensor.ndim == 3:
                direction, rate = self._muon(name, gradient), self.options.matrix_rate * schedule
            else:
                direction = self._adam(name, gradient)
                rate = self.options.vector_rate * schedule / (1 - 0.9**self.steps)
            if name == "weight" and self.adapters.form == "layer_norm":
                tensor.mul_(1 - self.options.decay * rate * self.units[name])
            tensor.sub_(direction, alpha=rate)
        if self.adapters.form == "orthogonal":
            tensors["weight"].copy_(retract(tensors["weight"]))

    def _muon(self, name: str, gradient: Tensor) -> Tensor:
        momentum = self.first[name].mul_(0.9).add_(gradient)
        ahead = gradient + 0.9 * momentum
        if self.adapters.form == "orthogonal":
            ahead = tangent(ahead, self.adapters.tensors()[name])
        return self.units[name] * newton_schulz(ahead)

    def _adam(self, name: str, gradient: Tensor) -> Tensor:
        first = self.first[name].lerp_(gradient, 0.1)
        second = self.second[name].lerp_(gradient.square(), 0.02)
        size = (second / (1 - 0.98**self.steps)).sqrt_().add_(1e-20)
        return self.units[name] * first / size

    def keep(self, chosen: Tensor) -> AdapterStack:
        """Go on with some of the fits (mask); returns their adapters."""
        self.adapters = self.adapters.keep(chosen)
        for tensors in (self.units, self.first, self.second):
            tensors.update({name: tensor[chosen] for name, tensor in tensors.items()})
        return self.adapters
