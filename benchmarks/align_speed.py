"""How fast the solver finds an answer that is there, against the published loop and tuned Adam.

    python benchmarks/align_speed.py [--hidden 640] [--wide 2048] [--tokens 5000] [--seconds 200]
        [--only stranger]

One core, CPU seconds, everything in one run (about half an hour). The case is made here: inputs
with a power-law spectrum, an offset and three massive dimensions, normalised to one length and
scaled by a gain, as in a language model; neurons of log-normal sizes, so that few of them carry
most of the output. Two targets: the source expert itself behind a hidden rotation of its inputs,
where an answer exists, and a stranger. FVU is on held-out tokens.

Ours is shown as `align` runs it, with the source expert and inputs of the target at hand, and with
less. Neither of the others has a use for them. Time of one budget includes the start of the fit.
"""

import argparse
import math
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from typing import get_args

import torch
from torch import Tensor, nn

from moescope.alignment.controls import hidden_rotation, rotation_for
from moescope.alignment.fit import fit
from moescope.alignment.optimiser import PRODUCTS
from moescope.alignment.options import Precision, SolverOptions
from moescope.alignment.samples import Samples
from moescope.experts.weights import ExpertWeights

MANY = 1_000_000
"""Steps that no budget allows."""
RATES = (1e-2, 3e-3, 1e-3)
GAINS = (1.0, 0.1)
"""Of LayerNorm at the start of Adam; the published loop has 1."""
SHARES = (0.02, 0.05, 0.1, 0.3, 1.0)
"""Of the seconds; ours is not run for all of them."""
KNOWN = ("both", "inputs", "nothing")
SETTINGS: dict[str, list[tuple[str, Precision]]] = {
    "hidden-rotation self": list(product(KNOWN, get_args(Precision))),
    "stranger": [(known, "float32") for known in KNOWN],
}
"""What ours is shown with, by case."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One source expert and what is to imitate it."""

    source: ExpertWeights
    train: Samples
    held_out: Samples
    target: ExpertWeights
    target_inputs: Tensor

    def fvu(self, adapter: Callable[[Tensor], Tensor]) -> float:
        """On the held-out tokens."""
        with torch.no_grad():
            error = (self.target(adapter(self.held_out.inputs)) - self.held_out.outputs).square()
        centred = self.held_out.outputs - self.train.outputs.mean(0)
        return float(error.sum() / centred.square().sum())

    def loss(self, adapter: nn.Module, chosen: Tensor | slice) -> Tensor:
        """Mean squared error over the variance of the training outputs."""
        y = self.train.outputs
        error = self.target(adapter(self.train.inputs[chosen])) - y[chosen]
        return error.square().sum(1).mean() / (y - y.mean(0)).square().sum(1).mean()


class Inputs:
    """Draws block inputs of one layer."""

    def __init__(self, hidden: int, generator: torch.Generator) -> None:
        self.mixing = torch.linalg.qr(torch.randn(hidden, hidden, generator=generator))[0]
        self.spectrum = torch.arange(1, hidden + 1) ** -0.5
        self.size = float(self.spectrum.square().mean().sqrt())
        self.offset = torch.randn(hidden, generator=generator) * self.size
        self.gain = torch.exp(0.3 * torch.randn(hidden, generator=generator))
        self.massive = torch.randperm(hidden, generator=generator)[:3]
        self.gain[self.massive] = 0.5

    def __call__(self, tokens: int, generator: torch.Generator) -> Tensor:
        """[tokens, hidden]."""

        def normal(width: int) -> Tensor:
            return torch.randn(tokens, width, generator=generator)

        length = torch.exp(0.3 * normal(1))
        x = normal(len(self.spectrum)) * self.spectrum * length @ self.mixing + self.offset
        levels = torch.tensor([30.0, -20.0, 15.0]) * self.size
        x[:, self.massive] = 5 * x[:, self.massive] + levels * torch.exp(0.3 * normal(1))
        return x / x.square().mean(1, keepdim=True).sqrt() * self.gain


def expert(x: Tensor, wide: int, generator: torch.Generator) -> ExpertWeights:
    """One whose gate and up rows see these inputs at a spread of about 1.5, heavy-tailed."""
    values, vectors = torch.linalg.eigh(torch.cov(x.T.double()))
    whiter = ((vectors * values.clamp_min(1e-6) ** -0.25) @ vectors.T).float()

    def rows() -> Tensor:
        matrix = torch.randn(wide, x.shape[1], generator=generator) @ whiter
        spread = 1.5 * torch.exp(0.4 * torch.randn(wide, generator=generator))
        return matrix * (spread / (x @ matrix.T).std(0))[:, None]

    sizes = torch.exp(0.7 * torch.randn(wide, generator=generator)) / wide**0.5
    return ExpertWeights(rows(), rows(), torch.randn(x.shape[1], wide, generator=generator) * sizes)


def cases(hidden: int, wide: int, tokens: int) -> dict[str, Case]:
    """Hidden-rotation self and a stranger of another layer."""
    generator = torch.Generator().manual_seed(0)
    layer, other = Inputs(hidden, generator), Inputs(hidden, generator)
    source = expert(layer(2_000, generator), wide, generator)
    x, held = layer(tokens, generator), layer(1_000, generator)
    train = Samples(x, source(x), torch.arange(tokens) // 50)
    held_out = Samples(held, source(held), torch.arange(len(held)) // 20)
    rotation = rotation_for(hidden, 0, "benchmark")
    elsewhere = other(2_000, generator)
    rotated = Case(
        source=source,
        train=train,
        held_out=held_out,
        target=hidden_rotation(source, rotation),
        target_inputs=layer(1_500, generator) @ rotation.T,
    )
    stranger = replace(rotated, target=expert(elsewhere, wide, generator), target_inputs=elsewhere)
    return {"hidden-rotation self": rotated, "stranger": stranger}


def ours(case: Case, seconds: float, known: str, precision: Precision) -> float:
    """Held-out FVU; `known` is "both", "inputs" of the target, or "nothing"."""
    found = fit(
        case.train,
        case.held_out,
        case.target,
        source=case.source if known == "both" else None,
        target_inputs=None if known == "nothing" else case.target_inputs,
        controls=False,
        budget_seconds=seconds,
        solver=SolverOptions(steps=MANY, patience=MANY, precision=precision),
    )
    return found.fvu


def adam(case: Case, seconds: float, rate: float, gain: float) -> float:
    """Mini-batches of 1,024 tokens, half a cosine."""
    adapter = _module(case, gain)
    optimiser = torch.optim.Adam(adapter.parameters(), lr=rate)
    generator = torch.Generator().manual_seed(0)
    began = time.process_time()
    while (share := (time.process_time() - began) / seconds) < 1:
        optimiser.param_groups[0]["lr"] = rate * 0.5 * (1 + math.cos(math.pi * share))
        chosen = torch.randperm(len(case.train), generator=generator)[:1_024]
        _descend(case, adapter, optimiser, chosen)
    return case.fvu(adapter)


def published(case: Case, budgets: list[float]) -> list[float]:
    """The study's full-batch loop, looked at after each budget."""
    adapter, found = _module(case, 1.0), []
    optimiser = torch.optim.Adam(adapter.parameters(), lr=1e-3)
    spent = 0.0
    for budget in budgets:
        while spent < budget:
            began = time.process_time()
            _descend(case, adapter, optimiser, slice(None))
            spent += time.process_time() - began
        found.append(case.fvu(adapter))
    return found


def _module(case: Case, gain: float) -> nn.Sequential:
    torch.manual_seed(0)
    hidden = case.train.hidden_size
    adapter = nn.Sequential(nn.Linear(hidden, hidden), nn.LayerNorm(hidden))
    nn.init.constant_(adapter[1].weight, gain)
    return adapter


def _descend(
    case: Case, adapter: nn.Module, optimiser: torch.optim.Optimizer, chosen: Tensor | slice
) -> None:
    optimiser.zero_grad()
    case.loss(adapter, chosen).backward()
    optimiser.step()


def tuned(case: Case, seconds: float) -> tuple[float, float]:
    """Rate and gain of the best short run of Adam."""
    trials = {(r, g): adam(case, seconds, r, g) for r in RATES for g in GAINS}
    return min(trials, key=lambda pair: trials[pair])


def compare(name: str, case: Case, seconds: float, settings: list[tuple[str, Precision]]) -> None:
    """FVU of everything at shares of `seconds`, and when ours passes what Adam ends with."""
    budgets = [seconds * share for share in SHARES]
    rate, gain = tuned(case, seconds / 10)
    theirs = {
        "published loop": published(case, budgets),
        f"Adam, tuned ({rate:g}, {gain:g})": [adam(case, s, rate, gain) for s in budgets],
    }
    rows = {
        f"ours, {known} known, {precision}": [ours(case, s, known, precision) for s in budgets[:-1]]
        for known, precision in settings
    }
    plain = fit(case.train, case.held_out, case.target, controls=False, budget_seconds=1e-3)
    print(f"\n{name}: held-out FVU", end=" ")
    print(f"(constant output {plain.fvu_constant:.3f}, linear map {plain.fvu_linear:.3f})")
    print(f"{'CPU seconds':34}" + "".join(f"{budget:>9.4g}" for budget in budgets))
    for label, values in (theirs | rows).items():
        print(f"{label:34}" + "".join(f"{value:>9.3f}" for value in values))
    final = list(theirs.values())[1][-1]
    for label, values in rows.items():
        passed = [b for b, v in zip(budgets, values, strict=False) if v < final]
        if passed:
            times = seconds / passed[0]
            print(f"{label}: below Adam's last by {passed[0]:.4g} s, {times:.0f} times sooner")


def peak(hidden: int, wide: int, tokens: int, precision: str) -> float:
    """Operations per second of the products that a step is made of, alone."""
    dtype = getattr(torch, precision)
    a, b = torch.randn(tokens, hidden, dtype=dtype), torch.randn(hidden, wide, dtype=dtype)
    torch.mm(a, b)
    began, repeats = time.process_time(), 40
    for _ in range(repeats):
        torch.mm(a, b)
    return repeats * 2 * tokens * hidden * wide / (time.process_time() - began)


def step_operations(hidden: int, wide: int, tokens: int) -> float:
    """Of one step of one fit: adapter and expert forth and back, Muon."""
    return 6 * tokens * hidden**2 + 12 * tokens * hidden * wide + PRODUCTS * 2 * hidden**3


def hundred_steps(case: Case, precision: Precision) -> float:
    """CPU seconds of 100 steps of one fit, without its start."""
    spent = []
    for steps in (20, 120):
        options = SolverOptions(
            steps=steps, patience=MANY, evaluate_every=MANY, precision=precision
        )
        began = time.process_time()
        fit(
            case.train,
            case.held_out,
            case.target,
            target_inputs=case.target_inputs,
            controls=False,
            solver=options,
        )
        spent.append(time.process_time() - began)
    return spent[1] - spent[0]


def costs(hidden: int, wide: int, tokens: int) -> None:
    """Seconds of 100 steps against each size, share of the peak, and memory so far."""
    batch = SolverOptions().batch_tokens
    print("cost of 100 steps; align_many.py has it against the number of targets")
    print(f"{'H':>6}{'I':>6}{'tokens':>8}{'CPU s':>8}{'of peak':>9}{'GB so far':>11}")
    for h, i, n in (
        (hidden // 4, wide // 4, tokens),
        (hidden // 2, wide // 2, tokens),
        (hidden, wide // 2, tokens),
        (hidden, wide, tokens // 2),
        (hidden, wide, tokens),
    ):
        case = cases(h, i, n)["stranger"]
        for precision in get_args(Precision):
            seconds = hundred_steps(case, precision)
            share = 100 * step_operations(h, i, batch) / seconds / peak(h, i, batch, precision)
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
            row = f"{h:6}{i:6}{n:8}{seconds:8.1f}{share:9.0%}{memory:11.2f}  {precision}"
            print(row, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--hidden", type=int, default=640)
    parser.add_argument("--wide", type=int, default=2_048)
    parser.add_argument("--tokens", type=int, default=5_000)
    parser.add_argument("--seconds", type=float, default=200.0)
    parser.add_argument("--only", choices=list(SETTINGS), help="one case, without the costs")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    hidden, wide, tokens = arguments.hidden, arguments.wide, arguments.tokens
    if arguments.only is None:
        costs(hidden, wide, tokens)
    for name, case in cases(hidden, wide, tokens).items():
        if arguments.only in (None, name):
            compare(name, case, arguments.seconds, SETTINGS[name])


if __name__ == "__main__":
    main()
