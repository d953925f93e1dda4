"""Tells the nonlinearity of experts from what it computes, not from what it is called."""

from collections.abc import Callable
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moescope.errors import ModelError
from moescope.experts.activations import ACTIVATIONS, neurons

_EXTREME = 12.0  # beyond the limits that families put on gate and up
_TOLERANCE = 1e-5


class Gating(NamedTuple):
    """How an experts module turns what its first matrices give into neurons."""

    activation: str
    """Name of the nonlinearity."""
    limit: float | None = None
    """Bound on gate and up."""
    up_offset: float = 0.0
    """Added to up."""
    interleaved: bool = False
    """Whether rows of gate and up alternate, rather than follow one another."""

    def of_both(self, before: Tensor) -> Tensor:
        """Neurons from gate and up in the order of the module."""
        gate, up = self.split(before, dim=-1)
        return self.neurons(gate, up)

    def neurons(self, first: Tensor, up: Tensor | None = None) -> Tensor:
        """Neurons from gate and up, or from up alone."""
        return neurons(
            first,
            up,
            activation_name=self.activation,
            limit=self.limit,
            up_offset=self.up_offset,
        )

    def split(self, before: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        """Gate and up, as views."""
        if self.interleaved:
            first = before.movedim(dim, 0)
            return first[::2].movedim(0, dim), first[1::2].movedim(0, dim)
        gate, up = before.chunk(2, dim)
        return gate, up


def gated(experts: nn.Module) -> Gating:
    """The gating of an experts module that has gates, by its `_apply_gate`.

    Raises:
        ModelError: It is none that `ExpertWeights` can express.
    """
    module: Any = experts
    limits = [value for value in vars(experts).values() if isinstance(value, float)]
    for name, limit, offset, interleaved in product(
        ACTIVATIONS, [None, *limits], (0.0, 1.0), (False, True)
    ):
        candidate = Gating(name, limit, offset, interleaved)
        if _alike(module._apply_gate, candidate.of_both):
            return candidate
    raise _unknown(experts)


def plain(experts: nn.Module) -> Gating:
    """The nonlinearity of an experts module without gates, by its `act_fn`.

    Raises:
        ModelError: It is none that `ExpertWeights` can express.
    """
    module: Any = experts
    for name in ACTIVATIONS:
        if _alike(module.act_fn, Gating(name).neurons):
            return Gating(name)
    raise _unknown(experts)


def _alike(one: Callable[[Tensor], Tensor], other: Callable[[Tensor], Tensor]) -> bool:
    """Whether two functions agree on numbers of all sizes, in no order that halves share."""
    generator = torch.Generator().manual_seed(0)
    values = _EXTREME * (2 * torch.rand(64, 6, generator=generator) - 1)
    with torch.no_grad():
        return torch.allclose(one(values), other(values), rtol=_TOLERANCE, atol=_TOLERANCE)


def _unknown(experts: nn.Module) -> ModelError:
    return ModelError(
        f"the nonlinearity of {type(experts).__name__} is none that moescope knows",
        expected=f"one of {', '.join(ACTIVATIONS)}, times up, with or without limits",
    )
