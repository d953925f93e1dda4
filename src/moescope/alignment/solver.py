"""The converged protocol: many fits at once, minibatches, Muon on whitened inputs.

All fits share the source's tokens, so a batch is [fits, tokens, hidden]. What a fit does never
depends on which others are in the batch.
"""

import math
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import compress

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from moescope.alignment.choice import Best, beats
from moescope.alignment.choice import CurvePoint as CurvePoint
from moescope.alignment.constant import constant_adapters
from moescope.alignment.domains import Domain, coordinates
from moescope.alignment.linear_parts import SourceLinear
from moescope.alignment.optimiser import Optimiser
from moescope.alignment.options import FitOptions, Regulariser, SolverOptions
from moescope.alignment.regularisers import penalty
from moescope.alignment.samples import Samples
from moescope.alignment.stack import AdapterStack, ExpertStack
from moescope.alignment.starts import start
from moescope.alignment.warm_starts import resumed
from moescope.alignment.whitening import Whitening
from moescope.experts.adapter import TENSORS, Adapter, Form
from moescope.experts.weights import ExpertWeights

_WARM_UP = 10  # steps


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
    """Whether steps were taken, beat the constant, and changed little in their second half; where
    the budget ended them, there were as many as `patience`. For the identity, which takes none,
    always."""
    constant_kept: bool = False
    """Whether `adapter` is the one of constant output: no fit beat it."""
    cut_short: bool = False
    """Whether the budget ended it, not its steps or its patience."""
    curve: tuple[CurvePoint, ...] = ()
    """Inner validation FVU along the way."""
    published_mse: float = math.nan
    """What the published loop prints, where that was run."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Task:
    """What all fits of one source expert share; inputs are in the coordinates of the form."""

    whitening: Whitening
    """The coordinates, learned on the training tokens."""
    train: Samples
    """Tokens the weights are trained on."""
    inner: Samples
    """Tokens for early stopping and choice."""
    options: SolverOptions
    """Steps, rates, sizes."""
    order: Callable[[], torch.Generator]
    """A fresh generator for the order of the tokens: every batch of fits sees the same."""
    source: SourceLinear | None
    """Linear part of the source expert, for the forms with a full matrix."""
    form: Form = "layer_norm"
    """What the adapters may do."""
    rank: int = 0
    """Of the delta of "low_rank"."""
    regulariser: Regulariser = "none"
    """What the loss adds to the FVU."""
    regulariser_weight: float = 1.0
    """How much of it."""

    @classmethod
    def of(
        cls,
        train: Samples,
        inner: Samples,
        options: FitOptions,
        order: Callable[[], torch.Generator],
        source: ExpertWeights | None = None,
    ) -> "Task":
        """Learn the coordinates; `train` and `inner` hold plain inputs.

        The source expert, where known, says more of its linear part than its tokens do.
        """
        shrinkage = options.solver.shrinkage
        whitening = coordinates(options.form, train.inputs, shrinkage)
        linear = None
        if "weight" in TENSORS[options.form]:
            linear = SourceLinear.of(train, whitening, source, shrinkage)
        return cls(
            whitening=whitening,
            train=Samples(whitening(train.inputs), train.outputs, train.documents),
            inner=Samples(whitening(inner.inputs), inner.outputs, inner.documents),
            options=options.solver,
            order=order,
            source=linear,
            form=options.form,
            rank=options.rank,
            regulariser=options.regulariser,
            regulariser_weight=options.regulariser_weight,
        )


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
    warm: Sequence[Adapter] | None = None,
) -> list[Fit]:
    """Train one adapter for every target, all of one shape.

    The learning rates follow half a cosine over the steps or, where they end first, over
    `seconds` of wall time, so that a fit that runs out of time has cooled down all the same.
    With `warm`, each fit goes on from the adapter given for it, as `resumed` takes them.
    """
    clock = Clock(task.options.steps, seconds)
    targets = ExpertStack.of(experts, task.train.inputs.device)
    constants = constant_adapters(task.train.outputs, targets, domains)
    if task.form == "identity":
        return [_untrained(shift) for shift in constants.shift]
    if warm is None:
        adapters, units = start(task.form, task.rank, task.train, task.source, targets, domains)
    else:
        adapters, units = resumed(task.form, task.rank, warm, task.whitening, domains)
    best = Best(adapters)
    optimiser = Optimiser(adapters, units, task.options)
    loss = _Loss(task, targets, domains)
    batches, step = _Batches(task), 0
    while True:
        share = clock.share(step)
        if step % task.options.evaluate_every == 0 or share == 1:
            best.look(step, clock.seconds, *loss.inner(adapters), adapters)
            going = best.going(step - task.options.patience)
            if share == 1 or not going.any():
                break
            if not going.all():
                adapters, loss = optimiser.keep(going), loss.keep(going)
                best.drop(going)
        parameters = [p.requires_grad_() for p in adapters.parameters()]
        with loss.products():
            gradients = torch.autograd.grad(loss(adapters, *batches.next()), parameters)
        for parameter in parameters:
            parameter.requires_grad_(False)
        warm_up = min(1.0, (step + 1) / _WARM_UP)
        with torch.no_grad(), loss.products():
            optimiser.step(gradients, warm_up * 0.5 * (1 + math.cos(math.pi * share)))
        step += 1
    cut = best.alive[going].tolist() if step < task.options.steps else []
    return _finish(task, targets, best, constants, cut)


def _untrained(constant: Float[Tensor, " hidden"]) -> Fit:
    """The fit of an adapter that has nothing to train."""
    return Fit(adapter=Adapter(form="identity"), constant=constant.clone(), steps=0, converged=True)


class _Loss:
    """Error of the targets behind their adapters, over the variance, plus the regulariser."""

    def __init__(self, task: Task, targets: ExpertStack, domains: Sequence[Domain]) -> None:
        self.task, self.targets, self.domains = task, targets, domains
        self.dtype = getattr(torch, task.options.precision)
        self.cast = targets.changed(lambda tensor: tensor.to(self.dtype))
        self.variance = _variance(task.train.outputs, task.train.outputs)

    def __call__(self, adapters: AdapterStack, x: Tensor, y: Tensor) -> Float[Tensor, ""]:
        """Summed over the fits, on one batch."""
        z = adapters(x)
        error = (self.cast(z.to(self.dtype)).float() - y).square().sum()
        loss: Tensor = error / (len(x) * self.variance) + self._penalty(z).sum()
        return loss

    def products(self) -> torch.autocast:
        """Where matrix products have the wanted precision."""
        device = self.task.train.inputs.device.type
        return torch.autocast(device, self.dtype, enabled=self.dtype != torch.float32)

    @torch.no_grad()
    def inner(
        self, adapters: AdapterStack
    ) -> tuple[Float[Tensor, " alive"], Float[Tensor, " alive"]]:
        """FVU and loss of each fit on the inner validation tokens."""
        inner = self.task.inner
        z = adapters(inner.inputs)
        error = (self.targets(z) - inner.outputs).square()
        variance = _variance(inner.outputs, self.task.train.outputs)
        fvu = error.sum(2).mean(1) / max(variance, 1e-30)
        return fvu, fvu + self._penalty(z)

    def keep(self, chosen: Bool[Tensor, " alive"]) -> "_Loss":
        """The loss of some of the fits."""
        domains = list(compress(self.domains, chosen.tolist()))
        return _Loss(self.task, self.targets.keep(chosen), domains)

    def _penalty(self, z: Float[Tensor, "alive tokens hidden"]) -> Float[Tensor, " alive"]:
        return self.task.regulariser_weight * penalty(self.task.regulariser, z, self.domains)


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


def _variance(y: Tensor, reference: Tensor) -> float:
    """Mean squared distance of `y` from the mean of `reference`."""
    return float((y - reference.mean(0)).square().sum(1).mean())


@torch.no_grad()
def _finish(
    task: Task,
    targets: ExpertStack,
    best: Best,
    constants: AdapterStack,
    cut: Collection[int],
) -> list[Fit]:
    """Fold the whitening into the weights; keep the constant adapter where it is as good.

    Args:
        task: What the fits share.
        targets: Their experts.
        best: Their weights and curves.
        constants: Their constant adapters.
        cut: Those that the budget ended.
    """
    better = beats(best.adapters, constants, targets, task.inner)
    plain = best.adapters.folded(task.whitening)
    silent = plain.silenced(constants.shift)
    fits = []
    for i, curve in enumerate(best.curves):
        steps, kept = curve[-1].step, not bool(better[i])
        early = min(point.fvu for point in curve if 2 * point.step <= steps)
        settled = early - float(best.fvu[i]) <= task.options.settled
        enough = steps >= task.options.patience if i in cut else steps > 0
        fits.append(
            Fit(
                adapter=(silent if kept else plain).adapter(i),
                constant=constants.shift[i].clone(),
                steps=steps,
                # With hardly a step, or with another adapter in its place, nothing has settled.
                converged=settled and enough and not kept,
                constant_kept=kept,
                cut_short=i in cut,
                curve=tuple(curve),
            )
        )
    return fits
