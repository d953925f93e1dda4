"""Our alignment of one source expert with four targets against the published loop.

    python benchmarks/align_pairs.py [--hidden 128] [--wide 96] [--tokens 2000]

Experts and tokens are made here: inputs with a power-law spectrum and an offset, as LayerNorm
leaves them. The published loop gets as many full-batch steps as fit into the time that ours took
for the same pairs. Everything is measured in one process, in turn; CPU seconds.
"""

import argparse
import time

import torch
from torch import nn
from torch.nn.functional import mse_loss, silu

from moescope.alignment.controls import hidden_rotation, rotation_for
from moescope.alignment.options import FitOptions
from moescope.alignment.pairs import fit_pairs
from moescope.alignment.samples import Samples
from moescope.experts.weights import ExpertWeights
from synthetic import expert, inputs


def published(train: Samples, target: ExpertWeights, seconds: float) -> tuple[nn.Module, int]:
    """The study's loop, written with modules: ten steps, and on until the time is over."""
    torch.manual_seed(0)
    hidden = train.hidden_size
    adapter = nn.Sequential(nn.Linear(hidden, hidden), nn.LayerNorm(hidden))
    optimiser = torch.optim.Adam(adapter.parameters(), lr=1e-3)
    began, steps = time.process_time(), 0
    while steps < 10 or time.process_time() - began < seconds:
        optimiser.zero_grad()
        z = adapter(train.inputs)
        given = (silu(z @ target.gate.T) * (z @ target.up.T)) @ target.down.T
        mse_loss(given, train.outputs).backward()
        optimiser.step()
        steps += 1
    return adapter, steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--wide", type=int, default=96)
    parser.add_argument("--tokens", type=int, default=2_000)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    hidden, wide = arguments.hidden, arguments.wide
    source = expert(hidden, wide, 0)
    x = inputs(arguments.tokens * 5 // 4, hidden, 0)
    everything = Samples(x, source(x), torch.arange(len(x)) * 200 // len(x))
    held = everything.documents >= 160
    train, held_out = everything.where(~held), everything.where(held)
    rotation = rotation_for(hidden, 1, "benchmark")
    targets = {f"stranger {seed}": expert(hidden, wide, seed) for seed in (1, 2, 3)}
    targets["hidden rotation"] = hidden_rotation(source, rotation)
    known = dict.fromkeys(targets, inputs(1_000, hidden, 9))
    known["hidden rotation"] = x[:1_000] @ rotation.T

    torch.nn.Linear(1, 1)(torch.zeros(1, 1)).sum().backward()  # warm
    began = time.process_time()
    options = FitOptions(controls=False)
    found = fit_pairs(train, held_out, targets, target_inputs=known, options=options)
    ours = (time.process_time() - began) / len(targets)
    variance = (held_out.outputs - train.outputs.mean(0)).square().sum()
    columns = ("ours", "s", "loop, same s", "loop, 10 steps", "constant")
    print(f"{'target':16}" + "".join(f"{column:>16}" for column in columns))
    for name, target in targets.items():
        adapter, steps = published(train, target, ours)
        ten, _ = published(train, target, 0.0)
        with torch.no_grad():
            same, early = (
                float((target(a(held_out.inputs)) - held_out.outputs).square().sum() / variance)
                for a in (adapter, ten)
            )
        cells = (f"{found[name].fvu:.3f}", f"{ours:.2f}", f"{same:.3f} ({steps})", f"{early:.3f}")
        cells += (f"{found[name].fvu_constant:.3f}",)
        print(f"{name:16}" + "".join(f"{cell:>16}" for cell in cells))
    began = time.process_time()
    fit_pairs(train, held_out, targets, source=source, target_inputs=known)
    print(f"all controls, four pairs (30 fits): {time.process_time() - began:.1f} CPU seconds")


if __name__ == "__main__":
    main()
