"""The converged protocol: many fits at once, minibatches, Muon on whitened inputs.

All fits share the source's tokens, so a batch is [fits, tokens, hidden]. What a fit does never
depends on which others are in the batch.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from moescope.alignment.constant import constant_adapters
from moescope.alignment.optimiser import Optimiser
from moescope.alignment.options import SolverOptions
from moescope.alignment.samples import Samples
from moescope.alignment.stack import AdapterStack, ExpertStack
from moescope.alignment.starts import Domain, start
from moescope.alignment.whitening import Whitening
from moescope.experts.adapter import Adapter
from moescope.experts.weights import ExpertWeights

_WARM_UP = 10  # steps


class CurvePoint(NamedTuple):
    """One look at the inner validation tokens."""

    step: int
    """Optimiser steps so far."""
    seconds: float
    """Wall time so far, of all fits of the batch together."""
    fvu: float
    """Fraction of variance unexplained on the inner validation tokens."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Fit:
    """One trained adapter."""

    adapter: Adapter
    """The best on the inner validation tokens; never above the constant one there."""
    constant: Float[Tensor, " hidden"]
    """The input of the target whose output is the best constant one."""
    steps: int
    """Optimiser steps until the fit stopped."""
    converged: bool
    """Whether steps were taken, beat the constant, and changed little in their second half."""
    constant_kept: bool = False
    """Whether `adapter` is the one of constant output: no fit beat it."""
    curve: tuple[CurvePoint, ...] = ()
    """Inner validation FVU along the way."""
    published_mse: float = math.nan
    """What the published loop prints, where that was run."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Task:
    """What all fits of one source expert share; inputs are white."""

    whitening: Whitening
    """Learned on the training tokens."""
    train: Samples
    """Tokens the weights are trained on."""
    inner: Samples
    """Tokens for early stopping and choice."""
    options: SolverOptions
    """Steps, rates, sizes."""
    order: Callable[[], torch.Generator]
    """A fresh generator for the order of the tokens: every batch of fits sees the same."""


class Clock:
    """How far a fit is: the larger of its share of the steps and of the time it may take."""

    def __init__(self, steps: int, seconds: float | None) -> None:
        self.steps, self.allowed = steps, seconds
        self.began = time.monotonic()

    @property
    def seconds(self) -> float:
        """Wall time since the start."""
        return time.monotonic() - self.began

    def share(self, step: int) -> float:
        """Progress after `step` steps: 1 is the end."""
        late = 0.0 if self.allowed is None else self.seconds / max(self.allowed, 1e-9)
        return min(1.0, max(step / self.steps, late))


def solve(
    task: Task,
    experts: Sequence[ExpertWeights],
    domains: Sequence[Domain],
    seconds: float | None = None,
) -> list[Fit]:
    """Train one adapter for every target, all of one shape.

    The learning rates follow half a cosine over the steps or, where they end first, over
    `seconds` of wall time, so that a fit that runs out of time has cooled down all the same.
    """
    clock = Clock(task.options.steps, seconds)
    targets = ExpertStack.of(experts, task.train.inputs.device)
    constants = constant_adapters(task.train.outputs, targets, domains)
    adapters, scale = start(
        task.train.inputs, task.train.outputs, targets, domains, task.options.start_output
    )
    best = _Best(adapters)
    optimiser, alive = Optimiser(adapters, scale, task.options), targets
    variance = _variance(task.train.outputs, task.train.outputs)
    batches, step = _Batches(task), 0
    while True:
        share = clock.share(step)
        if step % task.options.evaluate_every == 0 or share == 1:
            fvu = _inner_fvu(task, adapters, alive)
            best.look(step, clock.seconds, fvu, adapters)
            going = best.going(step - task.options.patience)
            if share == 1 or not going.any():
                break
            if not going.all():
                adapters, alive = optimiser.keep(going), alive.keep(going)
                best.drop(going)
        x, y = batches.next()
        parameters = [p.requires_grad_() for p in adapters.parameters()]
        error = (alive(adapters(x)) - y).square().sum() / (len(x) * variance)
        gradients = torch.autograd.grad(error, parameters)
        with torch.no_grad():
            for parameter in parameters:
                parameter.requires_grad_(False)
            warm = min(1.0, (step + 1) / _WARM_UP)
            optimiser.step(gradients, warm * 0.5 * (1 + math.cos(math.pi * share)))
        step += 1
    return _finish(task, targets, best, constants)


class _Batches:
    """Passes over the training tokens in random order, without the last partial batch."""

    def __init__(self, task: Task) -> None:
        self.samples, self.generator = task.train, task.order()
        self.size = min(task.options.batch_tokens, len(task.train))
        self.order, self.at = torch.empty(0, dtype=torch.int64), 0

    def next(self) -> tuple[Tensor, Tensor]:
        if self.at + self.size > len(self.order):
            order = torch.randperm(len(self.samples), generator=self.generator)
            self.order, self.at = order.to(self.samples.inputs.device), 0
        chosen = self.order[self.at : self.at + self.size]
        self.at += self.size
        return self.samples.inputs[chosen], self.samples.outputs[chosen]


class _Best:
    """The weights of every fit that were best on the inner validation tokens."""

    def __init__(self, adapters: AdapterStack) -> None:
        self.adapters = adapters.copy()
        fits = len(adapters.weight)
        device = adapters.weight.device
        self.fvu = torch.full((fits,), math.inf, device=device)
        self.step = torch.zeros(fits, dtype=torch.int64, device=device)
        self.alive = torch.arange(fits, device=device)
        self.curves: list[list[CurvePoint]] = [[] for _ in range(fits)]

    def look(
        self, step: int, seconds: float, fvu: Float[Tensor, " alive"], adapters: AdapterStack
    ) -> None:
        better = fvu < self.fvu[self.alive]
        where = self.alive[better]
        self.fvu[where], self.step[where] = fvu[better], step
        for kept, now in zip(self.adapters.parameters(), adapters.parameters(), strict=True):
            kept[where] = now[better]
        for fit, value in zip(self.alive.tolist(), fvu.tolist(), strict=True):
            self.curves[fit].append(CurvePoint(step, seconds, value))

    def going(self, since: int) -> Bool[Tensor, " alive"]:
        """Which fits have been better after step `since`."""
        return self.step[self.alive] > since

    def drop(self, going: Bool[Tensor, " alive"]) -> None:
        self.alive = self.alive[going]


def _variance(y: Tensor, reference: Tensor) -> float:
    """Mean squared distance of `y` from the mean of `reference`."""
    return float((y - reference.mean(0)).square().sum(1).mean())


@torch.no_grad()
def _inner_fvu(task: Task, adapters: AdapterStack, targets: ExpertStack) -> Float[Tensor, " fits"]:
    error = (targets(adapters(task.inner.inputs)) - task.inner.outputs).square()
    variance = _variance(task.inner.outputs, task.train.outputs)
    return error.sum(2).mean(1) / max(variance, 1e-30)


@torch.no_grad()
def _finish(task: Task, targets: ExpertStack, best: _Best, constants: AdapterStack) -> list[Fit]:
    """Fold the whitening into the weights; keep the constant adapter where it is as good."""
    better = _beats(task, targets, best.adapters, constants)
    weight, bias = task.whitening.fold(best.adapters.weight, best.adapters.bias)
    plain = AdapterStack(weight, bias, best.adapters.gain, best.adapters.shift)
    fits = []
    for i, curve in enumerate(best.curves):
        steps, kept = curve[-1].step, not bool(better[i])
        early = min(point.fvu for point in curve if 2 * point.step <= steps)
        settled = early - float(best.fvu[i]) <= task.options.settled
        fits.append(
            Fit(
                adapter=(constants if kept else plain).adapter(i),
                constant=constants.shift[i].clone(),
                steps=steps,
                # Without a step, or with another adapter in its place, nothing has settled.
                converged=settled and steps > 0 and not kept,
                constant_kept=kept,
                curve=tuple(curve),
            )
        )
    return fits


def _beats(
    task: Task, targets: ExpertStack, adapters: AdapterStack, constants: AdapterStack
) -> Bool[Tensor, " fits"]:
    """Which fits are below the constant adapter by more than a standard error.

    The error is that of the paired difference over the inner validation documents (tokens, where
    documents are not known): a smaller lead need not carry over to the held-out tokens.
    """
    inner = task.inner
    errors = [
        (targets(a(inner.inputs)) - inner.outputs).square().sum(2) for a in (adapters, constants)
    ]
    lead = errors[1] - errors[0]  # [fits, tokens]
    centred = lead - lead.mean(1, keepdim=True)
    if inner.documents is not None:
        ids, of = torch.unique(inner.documents, return_inverse=True)
        centred = torch.zeros(len(lead), len(ids), device=lead.device).index_add_(1, of, centred)
    return lead.sum(1) > centred.square().sum(1).sqrt()
