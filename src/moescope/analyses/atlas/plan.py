"""How long an atlas would take, before anything is captured: here, and on assumed GPUs."""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from moescope.alignment.candidates import Workshop
from moescope.alignment.randomness import generator
from moescope.alignment.samples import Samples
from moescope.alignment.trainer import converged_work, train_groups
from moescope.analyses.align.cost import FULL_MATRIX
from moescope.analyses.atlas.cost import Counts, Shape, counts, fit_operations, shapes_of
from moescope.analyses.atlas.findings import duration
from moescope.analyses.atlas.options import AtlasOptions
from moescope.analyses.atlas.screening import only_fit
from moescope.experts.weights import ExpertWeights
from moescope.models.view import MoEModel

_TIMED_FITS = 16
"""About as many as run as one batch; one where experts are large."""
_LARGE = 512
"""Hidden size from which a batch is one fit."""
_TIMED_STEPS = 20
_TIMED_STEPS_OF_MATRICES = 5
"""The same of large full matrices, whose steps take long enough to time few."""
_REPEATS = 2


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A GPU that is assumed, not measured."""

    name: str = "A100 80 GB"
    """What it is called."""
    peak: float = 19.5e12
    """Floating-point operations per second in fp32 without tensor cores, which the fits do not
    use: from NVIDIA's data sheet of the A100."""
    share: float = 0.4
    """What part of the peak fits reach: an assumption."""


@dataclass(frozen=True, kw_only=True)
class AtlasPlan:
    """What an atlas would take."""

    name: str
    """The model."""
    counts: Counts
    """With screening."""
    everything: Counts
    """The same experts without it: a converged fit for every pair."""
    rate: float
    """Operations per second of a few steps of fits of this shape, timed here."""
    gpu: Gpu
    """The assumed GPU."""

    def seconds(self, gpus: int | None = None) -> float:
        """Here, or on so many GPUs: imitated experts share nothing, so they divide evenly."""
        return self.counts.operations / self._rate(gpus)

    def seconds_of_everything(self, gpus: int | None = None) -> float:
        """The same without screening."""
        return self.everything.operations / self._rate(gpus)

    def _rate(self, gpus: int | None) -> float:
        return self.rate if gpus is None else gpus * self.gpu.peak * self.gpu.share

    def as_dict(self) -> dict[str, Any]:
        """The plan as plain values; seconds by number of GPUs, 0 for none."""
        where = (None, 1, 8)
        return asdict(self) | {
            "seconds": {gpus or 0: self.seconds(gpus) for gpus in where},
            "seconds_of_everything": {
                gpus or 0: self.seconds_of_everything(gpus) for gpus in where
            },
        }

    def __str__(self) -> str:
        need, gpu = self.counts, self.gpu
        share = need.short_operations / need.operations
        assumed = f"{gpu.share:.0%} of {gpu.peak / 1e12:.1f} TFLOP/s, predicted, not measured here"
        lines = [
            f"Atlas of {self.name}: {need.sources:,} imitated experts, {need.pairs:,} pairs",
            f"  screening  {need.short_fits:,} short fits, {share:.0%} of the operations",
            f"  converged  {need.converged_pairs:,} pairs, with controls "
            f"{need.converged_fits:,} fits",
            f"  operations {need.operations:.2g}; without screening "
            f"{self.everything.operations:.2g}",
            f"  here       about {duration(self.seconds())} ({self.rate / 1e9:.1f} GFLOP/s, "
            "timed on a few steps)",
        ]
        lines += [
            f"  {gpus} {gpu.name}  about {duration(self.seconds(gpus))}, without screening "
            f"{duration(self.seconds_of_everything(gpus))} ({assumed})"
            for gpus in (1, 8)
        ]
        return "\n".join(lines)


def atlas_plan(
    model: MoEModel,
    options: AtlasOptions = AtlasOptions(),  # noqa: B008 (frozen)
    gpu: Gpu = Gpu(),
) -> AtlasPlan:
    """What `atlas` with these options would take for a model; times a few steps of fits.

    Raises:
        OptionError: The model has no pair of decoder layers with experts.
    """
    return plan_of(model.name, shapes_of(model, options), options, gpu)


def plan_of(
    name: str,
    shapes: Sequence[Shape],
    options: AtlasOptions,
    gpu: Gpu = Gpu(),
) -> AtlasPlan:
    """The same for layers of which only the shapes are known."""
    return AtlasPlan(
        name=name,
        counts=counts(shapes, options),
        everything=counts(shapes, replace(options, survivors=None, shortlist=1.0)),
        rate=timed_rate(max(shapes, key=lambda shape: shape.hidden * shape.wide), options),
        gpu=gpu,
    )


def timed_rate(shape: Shape, options: AtlasOptions) -> float:
    """Operations per second of the steps of converged fits of one shape, with made-up tensors."""
    tokens = round((1 - options.held_out_share) * options.max_tokens)
    fits = 1 if shape.hidden >= _LARGE else _TIMED_FITS
    experts = {str(i): _expert(shape, i) for i in range(fits)}
    inputs = torch.randn(tokens, shape.hidden, generator=generator(0, "timed inputs"))
    source = _expert(shape, fits)
    train = Samples(inputs, source(inputs))
    fit = options.converged_fit()
    matrices = fits == 1 and options.form in FULL_MATRIX
    steps = _TIMED_STEPS_OF_MATRICES if matrices else _TIMED_STEPS
    fit = replace(fit, controls=False, solver=replace(fit.solver, steps=steps))
    shop = Workshop.of(train, experts, {}, source, "source", fit)
    seconds = []
    for _ in range(_REPEATS if fits > 1 else 1):
        start = time.process_time()
        work = converged_work(shop.task(fit), only_fit)
        train_groups(shop.groups(), work, {}, chunk_bytes=fit.solver.chunk_bytes)
        seconds.append(time.process_time() - start)
    # CPU time, which other processes disturb least; every thread has fits of its own.
    return fits * fit_operations(shape, fit, tokens) * torch.get_num_threads() / min(seconds)


def _expert(shape: Shape, number: int) -> ExpertWeights:
    random = generator(number, "timed expert")
    gate, up = (
        torch.randn(shape.wide, shape.hidden, generator=random) / shape.hidden**0.5
        for _ in range(2)
    )
    down = torch.randn(shape.hidden, shape.wide, generator=random) / shape.wide**0.5
    return ExpertWeights(gate, up, down)
