"""Train many adapters on the tokens of one source expert, in chunks that fit in memory.

A chunk is built, trained, reduced to what is reported, and dropped. What a fit finds never depends
on the chunk it is in.
"""

import math
from collections.abc import Callable, MutableMapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from typing import TypeVar

import torch

from moescope.alignment.candidates import Candidate, Group
from moescope.alignment.constant import constant_adapters
from moescope.alignment.outcomes import Label, Outcome
from moescope.alignment.published import STEPS, TOKENS, train_as_published
from moescope.alignment.samples import Samples
from moescope.alignment.solver import Fit, Task, solve
from moescope.alignment.stack import ExpertStack, same_shape
from moescope.experts.weights import ExpertWeights

Progress = Callable[[int, int], None]
"""Called with the number of fits done and the number of all fits."""

Reduction = Callable[[Label, Candidate, Fit], Outcome]
"""Keeps what is reported of a fit."""

_T = TypeVar("_T")
_Chunk = list[tuple[int, Label]]
"""Number of the group, and label, of every fit."""
_Found = list[tuple[Label, Outcome]]


@dataclass(frozen=True, kw_only=True, eq=False)
class Work:
    """What is done with every chunk."""

    train: Callable[[Sequence[Candidate], float | None], list[Fit]]
    """Fit candidates of one shape, in so many seconds at most."""
    reduce: Reduction
    """Keep what is reported of a fit."""
    tokens: int
    """Tokens that one step or look goes over, for the memory that a fit takes."""
    device: torch.device
    """Where the tokens are."""


def converged_work(task: Task, reduce: Reduction) -> Work:
    """The converged protocol."""

    def fit(chunk: Sequence[Candidate], seconds: float | None) -> list[Fit]:
        return solve(task, [c.expert for c in chunk], [c.domain for c in chunk], seconds)

    tokens = max(task.options.batch_tokens, len(task.inner))
    return Work(train=fit, reduce=reduce, tokens=tokens, device=task.train.inputs.device)


def published_work(train: Samples, seed: int, reduce: Reduction) -> Work:
    """The published loop, on all training tokens; it heeds no budget."""

    def fit(chunk: Sequence[Candidate], seconds: float | None) -> list[Fit]:
        experts = [candidate.expert for candidate in chunk]
        adapters, printed = train_as_published(train, experts, seed)
        targets = ExpertStack.of(experts, train.inputs.device)
        constants = constant_adapters(train.outputs, targets, [c.domain for c in chunk])
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

    tokens = min(TOKENS, len(train))
    return Work(train=fit, reduce=reduce, tokens=tokens, device=train.inputs.device)


def published_errors(
    train: Samples, targets: Sequence[ExpertWeights], seed: int, chunk_bytes: int
) -> list[float]:
    """What the published loop prints for each target."""
    found = [math.nan] * len(targets)
    device = train.inputs.device
    for same in same_shape(targets):
        each = _bytes_of_a_fit(targets[same[0]], min(TOKENS, len(train)))
        for chunk in _cut(same, _working_bytes(device, chunk_bytes) // each):
            experts = [targets[i].to(dtype=torch.float32, device=device) for i in chunk]
            _, printed = train_as_published(train, experts, seed)
            for i, error in zip(chunk, printed.tolist(), strict=True):
                found[i] = error
    return found


def train_groups(
    groups: Sequence[Group],
    work: Work,
    outcomes: MutableMapping[Label, Outcome],
    *,
    chunk_bytes: int,
    budget_seconds: float | None = None,
    progress: Progress | None = None,
) -> None:
    """Fit every candidate that is not among `outcomes` yet, and put it there.

    `outcomes` gets the fits of a chunk, from the calling thread, as soon as the chunk is done; the
    budget is for all that are missing.
    """
    missing = [
        replace(group, labels=tuple(label for label in group.labels if label not in outcomes))
        for group in groups
    ]
    total = sum(len(group.labels) for group in groups)
    done = total - sum(len(group.labels) for group in missing)
    if done == total:
        return
    schedule = _Schedule.of(missing, work, chunk_bytes)
    build = lru_cache(maxsize=schedule.workers)(lambda i: missing[i].build())

    def run(chunk: _Chunk) -> _Found:
        seconds = None
        if budget_seconds is not None:
            seconds = budget_seconds * schedule.share(chunk)
        candidates = [build(i)[label] for i, label in chunk]
        fits = work.train(candidates, seconds)
        return [
            (label, work.reduce(label, candidate, fit))
            for (_, label), candidate, fit in zip(chunk, candidates, fits, strict=True)
        ]

    def store(found: _Found) -> None:
        nonlocal done
        for label, outcome in found:
            outcomes[label] = outcome
        done += len(found)
        if progress is not None:
            progress(done, total)

    schedule.run(run, store)


@dataclass(frozen=True, kw_only=True)
class _Schedule:
    """Which fits run as one batch, and how many batches at a time."""

    chunks: list[_Chunk]
    workers: int

    @classmethod
    def of(cls, groups: Sequence[Group], work: Work, chunk_bytes: int) -> "_Schedule":
        """Candidates of one shape together, little enough to fit the bytes, evenly cut.

        Those of a group stay next to each other, so that it is built once or twice. On a CPU every
        thread of PyTorch takes its own chunk: small matrix products gain little from being split.
        """
        threads = torch.get_num_threads() if work.device.type == "cpu" else 1
        chunks: list[_Chunk] = []
        for same in same_shape([group.example for group in groups]):
            fits = [(i, label) for i in same for label in groups[i].labels]
            each = _bytes_of_a_fit(groups[same[0]].example, work.tokens)
            chunks += _cut(fits, _working_bytes(work.device, chunk_bytes) // each, threads)
        return cls(chunks=chunks, workers=min(threads, len(chunks)))

    def share(self, chunk: _Chunk) -> float:
        """Share of the whole time that a chunk may take."""
        fits = sum(map(len, self.chunks))
        return min(1.0, len(chunk) * self.workers / fits)

    def run(self, work: Callable[[_Chunk], _Found], store: Callable[[_Found], None]) -> None:
        """Do all chunks; `store` gets what each found, in this thread, as soon as it is done."""
        if self.workers == 1:
            for chunk in self.chunks:
                store(work(chunk))
            return
        threads = torch.get_num_threads()
        pool = ThreadPoolExecutor(self.workers, initializer=_one_thread)
        try:
            running = [pool.submit(work, chunk) for chunk in self.chunks]
            for future in as_completed(running):
                store(future.result())
        finally:
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(threads)


def _cut(fits: Sequence[_T], most: int, multiple: int = 1) -> list[list[_T]]:
    """Runs of at most so many, as even as can be; a multiple of `multiple` where there are enough.

    At least one in each, whatever `most` says.
    """
    number = math.ceil(len(fits) / max(1, most))
    number = min(len(fits), math.ceil(number / multiple) * multiple)
    ends = [len(fits) * i // number for i in range(number + 1)] if number else []
    return [list(fits[a:b]) for a, b in pairwise(ends)]


def _bytes_of_a_fit(expert: ExpertWeights, tokens: int) -> int:
    """Working memory of one fit.

    fp32: matrix, gradient, momentum, best and four temporaries; expert; activations.
    """
    hidden, wide = expert.hidden_size, expert.intermediate_size
    return 4 * (8 * hidden**2 + 3 * hidden * wide + tokens * (6 * hidden + 8 * wide))


def _working_bytes(device: torch.device, chunk_bytes: int) -> int:
    """Memory for one chunk; on a GPU, which has no cache to stay in, a quarter of what is free."""
    if device.type != "cuda":
        return chunk_bytes
    free, _ = torch.cuda.mem_get_info(device)
    return max(chunk_bytes, free // 4)


def _one_thread() -> None:
    torch.set_num_threads(1)
