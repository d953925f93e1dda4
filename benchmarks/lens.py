"""The lens in chunks against decoding each position and column by itself, both in this run.

    python benchmarks/lens.py [--positions 64] [--repeats 3]

Both ways give the same divergences (checked). The runs are interleaved and the medians of their
times compared. Then the peak memory of processes that decode as many positions as fit into one
chunk, and four times as many: it may grow by the states, but by no [positions, layers, vocabulary],
and by less than a tenth of that (checked).
"""

import argparse
import resource
import statistics
import subprocess
import sys
import time

import torch
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

from moescope.decoding.columns import watch
from moescope.decoding.endings import Ending, endings
from moescope.decoding.lens import decoded
from moescope.models.discover import moe_layers
from moescope.models.readout import Readout
from moescope.models.view import MoEModel

VOCABULARY, LAYERS, LENGTH = 65_536, 2, 64
FEW, MANY = 256, 768
Lens = tuple[Readout, list[Ending]]


def model() -> MoEModel:
    """Random, with 16 experts, 2 per token."""
    torch.manual_seed(0)
    config = Qwen2MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=4,
        intermediate_size=128,
        moe_intermediate_size=64,
        shared_expert_intermediate_size=128,
        num_experts=16,
        num_experts_per_tok=2,
        max_position_embeddings=LENGTH,
    )
    network = Qwen2MoeForCausalLM(config).eval()
    return MoEModel(model=network, tokenizer=None, layers=moe_layers(network), name="random")


def divergences(lens: Lens, ids: torch.Tensor, positions: torch.Tensor) -> list[torch.Tensor]:
    """One per layer and column."""
    last, layers = watch(*lens, ids, torch.ones_like(ids), positions)
    found: dict[tuple[int, object], list[torch.Tensor]] = {}
    for part in decoded(lens[0], last, layers):
        found.setdefault((part.number, part.column), []).append(part.divergence)
    return [torch.cat(parts) for parts in found.values()]


def in_chunks(lens: Lens, ids: torch.Tensor) -> torch.Tensor:
    """[columns, positions]."""
    return torch.stack(divergences(lens, ids, torch.arange(ids.numel())))


def one_by_one(lens: Lens, ids: torch.Tensor) -> torch.Tensor:
    """The same; one pass, then every position and column is decoded by itself."""
    everywhere = torch.arange(ids.numel())
    last, layers = watch(*lens, ids, torch.ones_like(ids), everywhere)
    rows = []
    for position in everywhere.tolist():
        here = slice(position, position + 1)
        parts = decoded(lens[0], last[here], [layer[here] for layer in layers])
        rows.append(torch.cat([part.divergence for part in parts]))
    return torch.stack(rows, dim=1)


def peak_bytes(positions: int) -> int:
    """Of a process of its own."""
    command = [sys.executable, __file__, "--positions", str(positions), "--only-peak"]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return int(output.split()[-1])


def random_ids(positions: int) -> torch.Tensor:
    rows = max(1, positions // LENGTH)
    return torch.randint(VOCABULARY, (rows, min(LENGTH, positions)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--positions", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only-peak", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    opened = model()
    lens = Readout.of(opened), endings(opened)
    ids = random_ids(options.positions)
    if options.only_peak:
        in_chunks(lens, ids)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
        return
    times: dict[str, list[float]] = {"chunks": [], "one by one": []}
    for _ in range(options.repeats):
        found = []
        for name, way in (("chunks", in_chunks), ("one by one", one_by_one)):
            start = time.perf_counter()
            found.append(way(lens, ids))
            times[name].append(time.perf_counter() - start)
        torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
    chunks, single = (statistics.median(values) for values in times.values())
    print(f"{ids.numel()} positions, {len(found[0])} columns, vocabulary {VOCABULARY:,}")
    print(f"{torch.get_num_threads()} threads, median of {options.repeats} repeats")
    print(f"in chunks {chunks:.2f} s, one by one {single:.2f} s, ratio {single / chunks:.1f}")
    grown = peak_bytes(MANY) - peak_bytes(FEW)
    whole = 4 * (MANY - FEW) * LAYERS * VOCABULARY
    print(f"peak memory from {FEW} to {MANY} positions: {grown / 2**20:+.0f} MiB")
    print(f"[positions, layers, vocabulary] would grow by {whole / 2**20:.0f} MiB")
    if grown > whole / 10:
        sys.exit("too much memory")


if __name__ == "__main__":
    main()
