"""Experts compared as matrices: against loops over pairs, and how much memory it takes.

    python benchmarks/weight_similarity.py speed [--experts 64] [--neurons 1408] [--hidden 1024]
    python benchmarks/weight_similarity.py memory [--mebibytes 1024]

`speed` times, in turns on one thread and by processor time, all pairs of experts as matrices and
one pair with its neurons matched, each against the procedure of A Closer Look into MoE written out
plainly: a loop over pairs with `CosineSimilarity`, and one assignment per matrix from similarities
that a loop over neurons fills. Only some of the pairs are run in the loops, and scaled up. At least
50 and 5 times as fast is asked for, in fp32, which is what is computed here whatever the dtype of
the weights; loops in the dtype of the weights are beside it, though their sums are too coarse.

`memory` runs the whole analysis on a random checkpoint of about that size, in a process of its
own, and asks for a peak of anonymous memory (Linux only) of at most the two layers that are
compared and 64 MB, above what the libraries take and the same analysis of a small checkpoint.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from scipy.stats import kendalltau
from torch import Tensor, nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from capture_memory import Watch
from moescope.analyses.weights.analysis import compared
from moescope.analyses.weights.options import WeightsOptions
from moescope.measures.matching import joined, matching, permutation_tau
from moescope.measures.similarity import cosines, inner_products
from moescope.models.on_disk import on_disk

MATRICES = ("up", "gate", "down")
LIMITS = {"all pairs, fp32 loop": 50.0, "matching": 5.0}
LAYERS, EXPERTS = 4, 16
LAYERS_HELD, BUFFERS_MB = 2, 64
SMALL, SMALL_MEBIBYTES = "small", 8
PAIRS, REPEATS = 40, 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("step", choices=["speed", "memory"])
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--neurons", type=int, default=1408)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--mebibytes", type=int, default=1024)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step == "speed":
        sys.exit("a ratio is below its limit" if speed(options) else 0)
    if options.folder:
        sys.exit("memory is above the limit" if memory(options.folder) else 0)
    with tempfile.TemporaryDirectory() as folder:
        build(Path(folder), options.mebibytes)
        build(Path(folder, SMALL), SMALL_MEBIBYTES)
        command = [sys.executable, __file__, "memory", "--folder", folder]
        sys.exit(subprocess.run(command, check=False).returncode)


def speed(options: argparse.Namespace) -> bool:
    torch.set_num_threads(1)
    shape = (options.experts, options.neurons, options.hidden)
    generator = torch.Generator().manual_seed(0)
    experts = torch.randn(shape, generator=generator).bfloat16()
    number = options.experts * (options.experts + 1) // 2
    first, second = (torch.randint(options.experts, (PAIRS,), generator=generator) for _ in "ab")
    pairs = list(zip(first.tolist(), second.tolist(), strict=True))
    ways: dict[str, tuple[Callable[[], object], float]] = {
        "all pairs": (lambda: all_pairs(experts), 1),
        "all pairs, fp32 loop": (lambda: pair_loop(experts, pairs, wide=True), number / PAIRS),
        "all pairs, bf16 loop": (lambda: pair_loop(experts, pairs, wide=False), number / PAIRS),
    }
    seconds = timed(ways)
    for way in list(ways)[1:]:
        show(way, seconds[way], seconds["all pairs"])
    some = options.neurons // 4
    one, other = ([experts[i + k, :some] for k in range(3)] for i in (0, 3))
    ways = {
        "ours": (lambda: match(one, other), 1),
        "matching": (lambda: published_match(one, other), 1),
    }
    found = timed(ways, repeats=3)
    show("matching", found["matching"], found["ours"])
    seconds["matching, ours"], seconds["matching"] = found["ours"], found["matching"]
    against = {"all pairs, fp32 loop": "all pairs", "matching": "matching, ours"}
    return any(seconds[way] / seconds[against[way]] < LIMITS[way] for way in LIMITS)


def show(way: str, loop: float, ours: float) -> None:
    limit = f"at least {LIMITS[way]:.0f}" if way in LIMITS else ""
    print(f"{way:24}{loop:10.2f} s {ours:10.3f} s {loop / ours:8.1f} times  {limit}")


def timed(
    ways: dict[str, tuple[Callable[[], object], float]], repeats: int = REPEATS
) -> dict[str, float]:
    """Median processor time of each, scaled, in turns."""
    times: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(repeats):
        for way, (run, scale) in ways.items():
            start = time.process_time()
            run()
            times[way].append(scale * (time.process_time() - start))
    return {way: statistics.median(found) for way, found in times.items()}


def all_pairs(experts: Tensor) -> Tensor:
    layer = list(experts)
    products = inner_products(layer, layer)
    squares = products.diagonal()
    return cosines(products, squares, squares)


def pair_loop(experts: Tensor, pairs: list[tuple[int, int]], *, wide: bool) -> None:
    cosine = nn.CosineSimilarity(dim=0)
    for first, second in pairs:
        one, other = experts[first].flatten(), experts[second].flatten()
        if wide:
            one, other = one.float(), other.float()
        cosine(one, other).float().numpy()


def match(one: list[Tensor], other: list[Tensor]) -> tuple[float, float]:
    left, right = joined(one), joined(other)
    products = left.rows @ right.rows.mT
    order = matching(products)
    chosen = torch.from_numpy(order)[:, None]
    return float(products.gather(1, chosen).sum()), permutation_tau(order)


def published_match(one: list[Tensor], other: list[Tensor]) -> list[tuple[float, float]]:
    """As published: one assignment for each matrix."""
    found = []
    across, along = nn.CosineSimilarity(dim=0), nn.CosineSimilarity(dim=1)
    for left, right in zip(one, other, strict=True):
        similarity = np.empty((len(left), len(right)))
        for neuron in range(len(left)):
            similarity[neuron] = across(left[neuron].unsqueeze(1), right.T).float().numpy()
        _, order = linear_sum_assignment(similarity, maximize=True)
        tau = kendalltau(order, np.arange(len(left))).statistic
        moved = right[torch.from_numpy(order)]
        found.append((float(along(left.flatten()[None], moved.flatten()[None])), float(tau)))
    return found


def build(folder: Path, mebibytes: int) -> None:
    """Save a random model of about that size, nearly all of it experts, in float32."""
    hidden = 64 * round((mebibytes * 2**20 / 4 / (LAYERS * EXPERTS * 6)) ** 0.5 / 64)
    config = Qwen3MoeConfig(
        vocab_size=512,
        hidden_size=hidden,
        moe_intermediate_size=2 * hidden,
        num_hidden_layers=LAYERS,
        num_experts=EXPERTS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
    )
    torch.manual_seed(0)
    Qwen3MoeForCausalLM(config).save_pretrained(folder)


def memory(folder: Path) -> bool:
    options = WeightsOptions(matched=0, matched_across=0, permutations=99)
    compared(on_disk(folder / SMALL), options)
    with Watch() as watch:
        start = watch.peak
        began = time.perf_counter()
        compared(on_disk(folder), options)
        seconds = time.perf_counter() - began
    weights = sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 1e6
    layer, rise = weights / LAYERS, watch.peak - start
    print(f"checkpoint {weights:,.0f} MB, a layer {layer:,.0f} MB; {seconds:.0f} s")
    most = LAYERS_HELD * layer + BUFFERS_MB
    print(f"peak {rise:,.0f} MB: {rise / layer:.1f} layers; at most {most:,.0f} MB")
    return rise > most


if __name__ == "__main__":
    main()
