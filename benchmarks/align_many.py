"""What a pair costs when many are aligned at once, and how much memory that takes.

    python benchmarks/align_many.py [--pairs 1 4 16 64] [--hidden 32 64 128 640] [--steps 20]

Three ways to fit the same pairs, in turn, in one process, on one core, in CPU seconds per pair:
`together`, one call whose fits run in batches; `one by one`, the same call with every fit a batch
of its own; `separate`, a call per pair (of the first four), where nothing is shared. From a width
of 512 on a batch is one fit: steps and pairs are few. The last lines say what memory a call takes
that fits a few hundred experts, beside what these experts would take together.
"""

import argparse
import multiprocessing
import resource
import time
from collections.abc import Callable
from dataclasses import replace

import torch

from moescope.alignment.options import RANDOM_SEEDS, FitOptions, SolverOptions
from moescope.alignment.pairs import fit_pairs
from moescope.alignment.result import AlignmentResult
from moescope.alignment.samples import Samples
from moescope.experts.weights import ExpertWeights
from synthetic import expert, inputs

ONE_BY_ONE = 1  # bytes: less than any fit takes


class Case:
    """One source expert and as many targets as are wanted."""

    def __init__(self, hidden: int, wide: int, tokens: int) -> None:
        self.hidden, self.wide = hidden, wide
        self.source = expert(hidden, wide, 0)
        x = inputs(tokens * 5 // 4, hidden, 0)
        everything = Samples(x, self.source(x), torch.arange(len(x)) * 200 // len(x))
        held = everything.documents >= 160
        self.train, self.held_out = everything.where(~held), everything.where(held)
        self.inputs = inputs(256, hidden, 9)

    def targets(self, pairs: int) -> dict[str, ExpertWeights]:
        """So many experts of the shape of the source."""
        return {f"target {i}": expert(self.hidden, self.wide, i + 1) for i in range(pairs)}

    def fit(
        self, targets: dict[str, ExpertWeights], options: FitOptions
    ) -> dict[str, AlignmentResult]:
        """The source against them."""
        return fit_pairs(
            self.train,
            self.held_out,
            targets,
            source=self.source,
            target_inputs=dict.fromkeys(targets, self.inputs),
            options=options,
        )


def seconds(work: Callable[[], object]) -> float:
    """CPU time, which other processes disturb least."""
    began = time.process_time()
    work()
    return time.process_time() - began


def costs(case: Case, pairs: int, options: FitOptions, repeats: int) -> tuple[float, float, float]:
    """Least CPU seconds per pair: together, one by one, separate."""
    single = replace(options, solver=replace(options.solver, chunk_bytes=ONE_BY_ONE))
    targets = case.targets(pairs)
    few = list(targets.items())[:4]
    ways = (
        lambda: case.fit(targets, options),
        lambda: case.fit(targets, single),
        lambda: [case.fit(dict([one]), options) for one in few],
    )
    times = [[seconds(way) for way in ways] for _ in range(repeats)]
    together, one_by_one, separate = (min(column) for column in zip(*times, strict=True))
    return together / pairs, one_by_one / pairs, separate / len(few)


def peak_megabytes(work: Callable[[], object]) -> float:
    """What a call needs beyond what is there before: in a process of its own."""

    def child(pipe) -> None:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        work()
        pipe.send((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)

    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=child, args=(send,))
    process.start()
    process.join()
    return float(receive.recv())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--hidden", type=int, nargs="+", default=[32, 64, 128, 640])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--targets", type=int, default=32, help="of the call whose memory is taken")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    solver = SolverOptions(steps=arguments.steps, evaluate_every=arguments.steps)
    columns = ("hidden", "pairs", "together", "one by one", "separate", "gain")
    print("".join(f"{column:>12}" for column in columns))
    for hidden in arguments.hidden:
        large = hidden >= 512
        case = Case(hidden, hidden // 2 if large else hidden * 3 // 4, 1_000)
        # A full matrix at every width: this is about cost, not about what is found.
        options = FitOptions(
            controls=False,
            form="linear",
            solver=replace(solver, steps=4 if large else solver.steps),
        )
        case.fit(case.targets(1), options)  # warm
        for pairs in [n for n in arguments.pairs if n <= 4 or not large]:
            found = costs(case, pairs, options, repeats=1 if large or pairs >= 16 else 2)
            cells = [f"{cost:.3f} s" for cost in found] + [f"{found[1] / found[0]:.2f}x"]
            print("".join(f"{cell:>12}" for cell in (hidden, pairs, *cells)), flush=True)

    case = Case(64, 1_024, 1_000)
    options = FitOptions(solver=replace(solver, steps=1))
    each = case.source.num_parameters * 4 / 2**20
    print(f"memory: hidden 64, width 1024, {each:.2f} MB per expert")
    for targets in (1, arguments.targets):
        given = case.targets(targets)
        fits = targets * (1 + RANDOM_SEEDS) + RANDOM_SEEDS + 1
        taken = peak_megabytes(lambda given=given: case.fit(given, options))
        print(
            f"{targets:4} targets, {fits:4} fits: peak {taken:.0f} MB beyond the tokens and the "
            f"targets; their experts alone {fits * each:.0f} MB"
        )


if __name__ == "__main__":
    main()
