"""How the error of a pair falls with what its adapter may do, real target against random ones."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
from jaxtyping import Float
from torch import Tensor

from moescope.alignment.candidates import Candidate, Workshop
from moescope.alignment.checks import refusal, require_fitting
from moescope.alignment.forms import num_parameters
from moescope.alignment.held_out import HeldOut
from moescope.alignment.options import MINIMUM_HELD_OUT, MINIMUM_TRAIN, FitOptions
from moescope.alignment.outcomes import Label
from moescope.alignment.samples import Samples
from moescope.alignment.solver import Fit, Task, solve
from moescope.alignment.stack import same_shape
from moescope.errors import AlignmentError, OptionError
from moescope.experts.adapter import Form
from moescope.experts.weights import ExpertWeights

RANKS = (0, 1, 4, 16, 64)
"""Ranks below the full one."""


@dataclass(frozen=True, kw_only=True)
class CapacityPoint:
    """One target behind an adapter of one rank."""

    kind: Literal["real", "random"]
    """The target itself, or a random one with its down projection."""
    seed: int | None
    """Which of the random ones; None for the target itself."""
    rank: int
    """Rank added to the diagonal; the hidden size is the full matrix."""
    adapter_parameters: int
    """Numbers in the adapter."""
    train_fvu: float
    """FVU on the tokens it was trained on: never more than with a smaller rank."""
    fvu: float
    """FVU on the held-out tokens."""


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """Errors of a target and of random ones in its place, by rank of the adapter."""

    points: tuple[CapacityPoint, ...]
    """By rank, smallest first; in each the target itself, then the random ones."""
    self_fvu: float
    """Held-out FVU of the source behind a hidden rotation with the full adapter; NaN where the
    source is not known."""

    def table(self) -> list[dict[str, Any]]:
        """The points as rows."""
        return [asdict(point) for point in self.points]

    @property
    def advantage(self) -> float:
        """How much less FVU the target leaves than random ones at equal capacity.

        That is the area between the two curves over the logarithm of the parameters, divided by its
        width. Near zero: the adapter does the work, whatever stands behind it. NaN where there is
        the full adapter alone.
        """
        log_parameters = np.log(self._parameters)
        if len(log_parameters) < 2:
            return math.nan
        gap = self._fvu("random") - self._fvu("real")
        return float(np.trapezoid(gap, log_parameters) / np.ptp(log_parameters))

    @property
    def parameters_saved(self) -> float:
        """How many times fewer parameters the target needs than random ones for the same error.

        The error is that of the random ones (their mean) with the full adapter; between two ranks,
        FVU is taken as linear in the logarithm of the parameters. NaN where the target never
        reaches it.
        """
        real, level = self._fvu("real"), self._fvu("random")[-1]
        log_parameters = np.log(self._parameters)
        reached = np.flatnonzero(real <= level)
        if not len(reached):
            return float("nan")
        first, needed = reached[0], log_parameters[reached[0]]
        if first > 0:
            before, at = real[first - 1], real[first]
            share = (level - at) / (before - at)
            needed -= share * (needed - log_parameters[first - 1])
        return float(np.exp(log_parameters[-1] - needed))

    @property
    def _parameters(self) -> Float[np.ndarray, " ranks"]:
        return np.array([p.adapter_parameters for p in self.points if p.kind == "real"], float)

    def _fvu(self, kind: str) -> Float[np.ndarray, " ranks"]:
        """Mean over the targets of a kind."""
        fvu = np.array([p.fvu for p in self.points if p.kind == kind])
        means: np.ndarray = fvu.reshape(len(self._parameters), -1).mean(1)
        return means


def capacity_curve(
    train: Samples,
    held_out: Samples,
    target: ExpertWeights,
    *,
    source: ExpertWeights | None = None,
    source_name: str = "source",
    target_name: str = "target",
    target_inputs: Float[Tensor, "..."] | None = None,
    ranks: Sequence[int] = RANKS,
    options: FitOptions = FitOptions(),  # noqa: B008 (frozen)
) -> Capacity:
    """Fit adapters of growing rank, each from the one before, for a target and random ones.

    `LayerNorm(D x + U V x + b) * gain + shift`, matched at the start to the moments of the target's
    inputs, with U V of each rank; at last a full matrix in the place of D + U V, which is fitted
    from its own start too: rotations are not found in small steps. Of several adapters, the one
    with the least error on the training tokens is kept, that of a smaller rank included.

    Args:
        train: Tokens to learn from.
        held_out: Tokens for the reported errors.
        target: The expert to put behind the adapters.
        source: The expert that made the outputs, for the starts and for `self_fvu`.
        source_name: Keys the random choices of the source, as in `fit_pairs`.
        target_name: Keys those of the target.
        target_inputs: Inputs [tokens, hidden] of the target in its own layer, where known.
        ranks: Of the smaller adapters. Those from half of the hidden size on are left out: they
            have as many numbers as the full matrix, which is always the last.
        options: Solver, seed, regulariser, and budget for all fits; the form is not used.

    Raises:
        AlignmentError: There are too few tokens, the outputs do not vary, shapes do not fit, or a
            tensor holds NaN or infinity.
        OptionError: The protocol is the published one.
    """
    if options.protocol == "published":
        raise OptionError(
            "a capacity curve has no published protocol",
            got=options.protocol,
            expected="converged",
        )
    known = {} if target_inputs is None else {target_name: target_inputs}
    require_fitting(train, held_out, {target_name: target}, source, known)
    _require_numbers(train, held_out)
    train, held_out = train.single(), held_out.single()
    held = HeldOut(held_out, train.outputs.mean(0))
    options = replace(options, form="layer_norm", controls=True)
    workshop = Workshop.of(train, {target_name: target}, known, source, source_name, options)
    # All targets take the same number of steps: stopping early would favour the patient.
    solver = replace(options.solver, patience=options.solver.steps)
    options = replace(options, solver=solver)
    hidden = train.hidden_size
    smaller = sorted(rank for rank in set(ranks) if 2 * rank < hidden)
    climb = _Climb(_candidates(workshop), HeldOut(workshop.rest, workshop.rest.outputs.mean(0)))
    points: list[CapacityPoint] = []
    for rank in [*smaller, hidden]:
        form: Form = "layer_norm" if rank == hidden else "low_rank"
        task = workshop.task(replace(options, form=form, rank=rank))
        budget = options.budget_seconds
        seconds = None if budget is None else budget / (len(smaller) + 2)
        climb.to(task, seconds)
        if form == "layer_norm":
            climb.to(task, seconds, afresh=True)
        points += climb.points(num_parameters(form, hidden, rank), rank, held)
    return Capacity(points=tuple(points), self_fvu=climb.self_fvu(held))


def _require_numbers(train: Samples, held_out: Samples) -> None:
    status = refusal(train, held_out)
    if status == "too_few_tokens":
        raise AlignmentError(
            "too few tokens for a capacity curve",
            got=f"{len(train)} training and {len(held_out)} held-out tokens",
            expected=f"at least {MINIMUM_TRAIN} and {MINIMUM_HELD_OUT}",
        )
    if status == "constant_outputs":
        raise AlignmentError(
            "the outputs of the source do not vary: there is nothing to explain",
            got="constant training or held-out outputs",
            expected="outputs that differ between tokens",
        )


def _candidates(workshop: Workshop) -> dict[Label, Candidate]:
    """The target, random ones with its down projection, the hidden-rotation self."""
    found: dict[Label, Candidate] = {}
    for group in workshop.groups():
        if group.labels[0][0] != "all random":
            found |= group.build()
    return found


class _Climb:
    """Fits of several targets that go up in rank, never up in training error.

    Args:
        candidates: The targets.
        trained: The tokens of the training, for the training error.
    """

    def __init__(self, candidates: Mapping[Label, Candidate], trained: HeldOut) -> None:
        self.candidates, self.trained = candidates, trained
        self.fits: dict[Label, Fit] = {}
        self.train_fvu = dict.fromkeys(candidates, math.inf)

    def to(self, task: Task, seconds: float | None, *, afresh: bool = False) -> None:
        """Fit all with the form and rank of `task`, from where they are or from its start."""
        found: dict[Label, Fit] = {}
        labels = list(self.candidates)
        experts = [self.candidates[label].expert for label in labels]
        for same in same_shape(experts):
            chosen = [labels[i] for i in same]
            fits = solve(
                task,
                [experts[i] for i in same],
                [self.candidates[label].domain for label in chosen],
                None if seconds is None else seconds * len(same) / len(labels),
                None if afresh or not self.fits else [self.fits[n].adapter for n in chosen],
            )
            found |= dict(zip(chosen, fits, strict=True))
        for label, fit in found.items():
            fvu = self._fvu(label, fit, self.trained)
            if fvu <= self.train_fvu[label]:
                self.fits[label], self.train_fvu[label] = fit, fvu

    def points(self, parameters: int, rank: int, held: HeldOut) -> list[CapacityPoint]:
        """Where the targets are now."""
        return [
            CapacityPoint(
                kind="real" if label[0] == "pair" else "random",
                seed=None if label[0] == "pair" else int(label[2]),
                rank=rank,
                adapter_parameters=parameters,
                train_fvu=self.train_fvu[label],
                fvu=self._fvu(label, fit, held),
            )
            for label, fit in self.fits.items()
            if label[0] != "self"
        ]

    def self_fvu(self, held: HeldOut) -> float:
        """Where the hidden-rotation self is now; NaN where there is none."""
        own = [self._fvu(n, fit, held) for n, fit in self.fits.items() if n[0] == "self"]
        return own[0] if own else math.nan

    def _fvu(self, label: Label, fit: Fit, tokens: HeldOut) -> float:
        return tokens.share(tokens.errors_of(fit, self.candidates[label].expert))
