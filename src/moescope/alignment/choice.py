"""Which weights of a fit are kept: chosen on the inner validation tokens."""

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from moescope.alignment.samples import Samples
from moescope.alignment.stack import AdapterStack, ExpertStack

_FEWEST_DOCUMENTS = 8
"""That say how much a difference varies."""


class CurvePoint(NamedTuple):
    """One look at the inner validation tokens."""

    step: int
    """Optimiser steps so far."""
    seconds: float
    """Wall time so far, of all fits of the batch together."""
    fvu: float
    """Fraction of variance unexplained on the inner validation tokens."""


class Best:
    """The weights of every fit that were best on the inner validation tokens."""

    def __init__(self, adapters: AdapterStack) -> None:
        self.adapters = adapters.copy()
        fits, device = len(adapters), adapters.shift.device
        self.fvu = torch.full((fits,), math.inf, device=device)
        self.loss = self.fvu.clone()
        self.step = torch.zeros(fits, dtype=torch.int64, device=device)
        self.alive = torch.arange(fits, device=device)
        self.curves: list[list[CurvePoint]] = [[] for _ in range(fits)]

    def look(
        self,
        step: int,
        seconds: float,
        fvu: Float[Tensor, " alive"],
        loss: Float[Tensor, " alive"],
        adapters: AdapterStack,
    ) -> None:
        """Take over the weights of those fits whose loss is the least so far."""
        better = loss < self.loss[self.alive]
        where = self.alive[better]
        self.fvu[where], self.loss[where], self.step[where] = fvu[better], loss[better], step
        for kept, now in zip(self.adapters.parameters(), adapters.parameters(), strict=True):
            kept[where] = now[better]
        for fit, value in zip(self.alive.tolist(), fvu.tolist(), strict=True):
            self.curves[fit].append(CurvePoint(step, seconds, value))

    def going(self, since: int) -> Bool[Tensor, " alive"]:
        """Which fits have been better after step `since`."""
        return self.step[self.alive] > since

    def drop(self, going: Bool[Tensor, " alive"]) -> None:
        """Look no more at the others."""
        self.alive = self.alive[going]


@torch.no_grad()
def beats(
    adapters: AdapterStack, constants: AdapterStack, targets: ExpertStack, inner: Samples
) -> Bool[Tensor, " fits"]:
    """Which fits are below the constant adapter by more than a standard error.

    The error is that of the paired difference over the inner validation documents (tokens, where
    there are too few documents): a smaller lead need not carry over to the held-out tokens.
    """
    errors = [
        (targets(a(inner.inputs)) - inner.outputs).square().sum(2) for a in (adapters, constants)
    ]
    lead = errors[1] - errors[0]  # [fits, tokens]
    centred = lead - lead.mean(1, keepdim=True)
    if inner.documents is not None and inner.num_documents >= _FEWEST_DOCUMENTS:
        ids, of = torch.unique(inner.documents, return_inverse=True)
        centred = torch.zeros(len(lead), len(ids), device=lead.device).index_add_(1, of, centred)
    return lead.sum(1) > centred.square().sum(1).sqrt()
