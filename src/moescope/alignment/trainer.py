"""Train many adapters on the tokens of one source expert, in chunks that fit in memory."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from moescope.alignment.constant import constant_adapters
from moescope.alignment.options import SolverOptions
from moescope.alignment.published import STEPS, TOKENS, train_as_published
from moescope.alignment.randomness import generator
from moescope.alignment.samples import Samples
from moescope.alignment.solver import Fit, Task, solve
from moescope.alignment.stack import ExpertStack, same_shape
from moescope.alignment.starts import Domain
from moescope.alignment.whitening import Whitening
from moescope.experts.weights import ExpertWeights

Progress = Callable[[int, int], None]
"""Called with the number of fits done and the number of all fits."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Candidate:
    """One target to fit."""

    expert: ExpertWeights
    """The expert behind the adapter."""
    domain: Domain
    """Where its inputs lie."""


def training_task(
    train: Samples, inner: Samples, options: SolverOptions, seed: int, source_name: str
) -> Task:
    """What all converged fits of one source share."""
    whitening = Whitening.of(train.inputs, options.shrinkage)
    return Task(
        whitening=whitening,
        train=Samples(whitening(train.inputs), train.outputs, train.documents),
        inner=Samples(whitening(inner.inputs), inner.outputs, inner.documents),
        options=options,
        order=lambda: generator(seed, source_name, "order of the tokens"),
    )


def train_converged(
    task: Task,
    candidates: Sequence[Candidate],
    budget_seconds: float | None = None,
    progress: Progress | None = None,
) -> list[Fit]:
    """Fit every candidate with the converged protocol; the budget is for all of them."""
    began = time.monotonic()
    tokens = max(task.options.batch_tokens, len(task.inner))
    fits: dict[int, Fit] = {}
    for chunk in _chunks(candidates, tokens, task.options.chunk_bytes):
        seconds = None
        if budget_seconds is not None:
            left = budget_seconds - (time.monotonic() - began)
            seconds = max(0.0, left) * len(chunk) / (len(candidates) - len(fits))
        chosen = [candidates[i] for i in chunk]
        solved = solve(task, [c.expert for c in chosen], [c.domain for c in chosen], seconds)
        fits.update(zip(chunk, solved, strict=True))
        if progress is not None:
            progress(len(fits), len(candidates))
    return [fits[i] for i in range(len(candidates))]


def train_published(
    train: Samples,
    candidates: Sequence[Candidate],
    seed: int,
    chunk_bytes: int,
    progress: Progress | None = None,
) -> list[Fit]:
    """Fit every candidate with the published loop, on all training tokens."""
    fits: dict[int, Fit] = {}
    for chunk in _chunks(candidates, min(TOKENS, len(train)), chunk_bytes):
        chosen = [candidates[i] for i in chunk]
        experts = [c.expert for c in chosen]
        adapters, printed = train_as_published(train, experts, seed)
        targets = ExpertStack.of(experts, train.inputs.device)
        constants = constant_adapters(train.outputs, targets, [c.domain for c in chosen])
        for j, i in enumerate(chunk):
            fits[i] = Fit(
                adapter=adapters.adapter(j),
                constant=constants.adapter(j),
                steps=STEPS,
                converged=False,
                published_mse=float(printed[j]),
            )
        if progress is not None:
            progress(len(fits), len(candidates))
    return [fits[i] for i in range(len(candidates))]


def _chunks(candidates: Sequence[Candidate], tokens: int, chunk_bytes: int) -> list[list[int]]:
    """Candidates of one shape, as many at once as fit in memory."""
    chunks = []
    for group in same_shape([c.expert for c in candidates]):
        expert = candidates[group[0]].expert
        hidden, wide = expert.hidden_size, expert.intermediate_size
        # fp32: matrix, gradient, momentum, best and four temporaries; expert; activations.
        each = 4 * (8 * hidden**2 + 3 * hidden * wide + tokens * (6 * hidden + 8 * wide))
        size = max(1, chunk_bytes // each)
        chunks += [group[i : i + size] for i in range(0, len(group), size)]
    return chunks
