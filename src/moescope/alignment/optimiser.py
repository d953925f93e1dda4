"""Muon for the matrix, Adam for the vectors, of many fits at once."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from moescope.alignment.options import SolverOptions
from moescope.alignment.stack import AdapterStack

ROUNDS = 3
PRODUCTS = 3 * ROUNDS
"""Matrix products of one step's `newton_schulz`."""


def newton_schulz(matrix: Float[Tensor, "fits rows columns"]) -> Float[Tensor, "fits rows columns"]:
    """Nearly the orthogonal polar factor: Muon's quintic iteration (Jordan et al. 2024).

    Three rounds do as well here as the usual five.
    """
    x: Tensor = matrix / (matrix.norm(dim=(-2, -1), keepdim=True) + 1e-20)
    for _ in range(ROUNDS):
        gram = torch.bmm(x, x.mT)
        polynomial = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, polynomial, x, beta=3.4445)
    return x


class Optimiser:
    """Changes the tensors of an `AdapterStack` in place.

    Args:
        adapters: The fits, on white inputs.
        scale: Scale of each fit's gain at the start; gain and shift move in this unit, the bias,
            which acts beside white inputs, in units of one.
        options: Rates.
    """

    def __init__(
        self, adapters: AdapterStack, scale: Float[Tensor, "fits 1"], options: SolverOptions
    ) -> None:
        self.options = options
        self.matrix, *self.vectors = adapters.parameters()
        self.scales = [torch.ones_like(scale), scale, scale]
        self.momentum = torch.zeros_like(self.matrix)
        self.first = [torch.zeros_like(vector) for vector in self.vectors]
        self.second = [torch.zeros_like(vector) for vector in self.vectors]
        self.steps = 0

    def step(self, gradients: Sequence[Tensor], schedule: float) -> None:
        """One step for weight, bias, gain and shift; `schedule` scales the rates."""
        self.steps += 1
        matrix, *vectors = gradients
        self.momentum.mul_(0.9).add_(matrix)
        direction = newton_schulz(matrix + 0.9 * self.momentum)
        self.matrix.sub_(direction, alpha=self.options.matrix_rate * schedule)
        rate = self.options.vector_rate * schedule / (1 - 0.9**self.steps)
        for i, gradient in enumerate(vectors):
            self.first[i].lerp_(gradient, 0.1)
            self.second[i].lerp_(gradient.square(), 0.02)
            size = (self.second[i] / (1 - 0.98**self.steps)).sqrt_().add_(1e-20)
            self.vectors[i].sub_(self.scales[i] * self.first[i] / size, alpha=rate)

    def keep(self, chosen: Tensor) -> AdapterStack:
        """Go on with some of the fits (mask); returns their adapters."""
        self.matrix, self.momentum = self.matrix[chosen], self.momentum[chosen]
        for tensors in (self.vectors, self.scales, self.first, self.second):
            tensors[:] = [tensor[chosen] for tensor in tensors]
        return AdapterStack.holding([self.matrix, *self.vectors])
