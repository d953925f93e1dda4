"""Train many adapters on the tokens of one source expert, in chunks that fit in memory."""

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass

import torch

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
    tokens = max(task.options.batch_tokens, len(task.inner))
    schedule = _Schedule.of(candidates, tokens, task.options.chunk_bytes)

    def work(chunk: list[int]) -> list[Fit]:
        seconds = None
        if budget_seconds is not None:
            seconds = budget_seconds * schedule.share(chunk)
        chosen = [candidates[i] for i in chunk]
        return solve(task, [c.expert for c in chosen], [c.domain for c in chosen], seconds)

    return schedule.run(work, progress)


def train_published(
    train: Samples,
    candidates: Sequence[Candidate],
    seed: int,
    chunk_bytes: int,
    progress: Progress | None = None,
) -> list[Fit]:
    """Fit every candidate with the published loop, on all training tokens."""

    def work(chunk: list[int]) -> list[Fit]:
        experts = [candidates[i].expert for i in chunk]
        adapters, printed = train_as_published(train, experts, seed)
        targets = ExpertStack.of(experts, train.inputs.device)
        constants = constant_adapters(train.outputs, targets, [candidates[i].domain for i in chunk])
        return [
            Fit(
                adapter=adapters.adapter(j),
                constant=constants.shift[j].clone(),
                steps=STEPS,
                converged=False,
                published_mse=float(printed[j]),
            )
            for j in range(len(chunk))
        ]

    return _Schedule.of(candidates, min(TOKENS, len(train)), chunk_bytes).run(work, progress)


@dataclass(frozen=True, kw_only=True)
class _Schedule:
    """Which fits run as one batch, and how many batches at a time."""

    chunks: list[list[int]]
    workers: int

    @classmethod
    def of(cls, candidates: Sequence[Candidate], tokens: int, chunk_bytes: int) -> "_Schedule":
        """Candidates of one shape together, little enough to fit the bytes, evenly cut.

        On a CPU every thread of PyTorch takes its own batch: small matrix products gain little
        from being split.
        """
        on_cpu = candidates[0].domain.inputs.device.type == "cpu"
        threads = torch.get_num_threads() if on_cpu else 1
        chunks: list[list[int]] = []
        for group in same_shape([c.expert for c in candidates]):
            expert = candidates[group[0]].expert
            hidden, wide = expert.hidden_size, expert.intermediate_size
            # fp32: matrix, gradient, momentum, best and four temporaries; expert; activations.
            each = 4 * (8 * hidden**2 + 3 * hidden * wide + tokens * (6 * hidden + 8 * wide))
            number = math.ceil(len(group) / max(1, chunk_bytes // each))
            number = min(len(group), math.ceil(number / threads) * threads)
            chunks += [group[i::number] for i in range(number)]
        return cls(chunks=chunks, workers=min(threads, len(chunks)))

    def share(self, chunk: list[int]) -> float:
        """Share of the whole time that a batch may take."""
        fits = sum(map(len, self.chunks))
        return min(1.0, len(chunk) * self.workers / fits)

    def run(self, work: Callable[[list[int]], list[Fit]], progress: Progress | None) -> list[Fit]:
        """Do all batches; fits in the order of the candidates."""
        fits: dict[int, Fit] = {}
        total = sum(map(len, self.chunks))

        def store(chunk: list[int], found: list[Fit]) -> None:
            fits.update(zip(chunk, found, strict=True))
            if progress is not None:
                progress(len(fits), total)

        if self.workers == 1:
            for chunk in self.chunks:
                store(chunk, work(chunk))
        else:
            threads = torch.get_num_threads()
            try:
                with ThreadPoolExecutor(self.workers, initializer=_one_thread) as pool:
                    running = {pool.submit(work, chunk): chunk for chunk in self.chunks}
                    for future in as_completed(running):
                        store(running[future], future.result())
            finally:
                torch.set_num_threads(threads)
        return [fits[i] for i in range(total)]


def _one_thread() -> None:
    torch.set_num_threads(1)
