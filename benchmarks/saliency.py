"""Saliency from routed rows against running every expert on every token, both in this run.

    python benchmarks/saliency.py [--tokens 4096] [--hidden 256] [--repeats 5]

Both ways end with the same sums (checked). Routing is random and uneven. The runs are interleaved
and the medians of their times compared; at least experts / (2 * top-k) is asked for.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from moescope.experts.weights import ExpertWeights
from moescope.measures.saliency import Saliency, routed_norms
from synthetic import expert, inputs

SHAPES = {"Qwen1.5-MoE": (60, 4), "OLMoE": (64, 8), "Qwen3-MoE": (128, 8)}
"""Experts and top-k."""


def routing(tokens: int, num_experts: int, top_k: int) -> tuple[Tensor, Tensor]:
    """[tokens, top_k] experts and weights; some experts are preferred."""
    generator = torch.Generator().manual_seed(0)
    preference = torch.randn(num_experts, generator=generator)
    logits = torch.randn(tokens, num_experts, generator=generator) + 0.5 * preference
    weights, experts = logits.softmax(-1).topk(top_k)
    return experts, weights


def from_routed_rows(x: Tensor, experts: Tensor, layer: list[ExpertWeights]) -> Tensor:
    return routed_norms(x, experts, lambda expert, rows: layer[expert](rows))


def from_every_expert(x: Tensor, experts: Tensor, layer: list[ExpertWeights]) -> Tensor:
    norms = torch.stack([weights(x).norm(dim=-1) for weights in layer], dim=1)
    return norms.gather(1, experts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    ways: tuple[Callable[..., Tensor], ...] = (from_routed_rows, from_every_expert)
    x = inputs(options.tokens, options.hidden, seed=0)
    print(f"{options.tokens} tokens, hidden {options.hidden}, expert width {options.hidden // 2}")
    print(f"{torch.get_num_threads()} threads, median of {options.repeats} repeats\n")
    print(
        f"{'':12}{'experts':>8}{'top-k':>6}{'routed s':>10}{'every s':>10}{'ratio':>8}{'limit':>8}"
    )
    failed = False
    for name, (num_experts, top_k) in SHAPES.items():
        layer = [expert(options.hidden, options.hidden // 2, seed) for seed in range(num_experts)]
        experts, weights = routing(options.tokens, num_experts, top_k)
        times: dict[Callable[..., Tensor], list[float]] = {way: [] for way in ways}
        for _ in range(options.repeats):
            sums = []
            for way in ways:
                start = time.perf_counter()
                sums.append(Saliency.of(experts, weights, way(x, experts, layer), num_experts))
                times[way].append(time.perf_counter() - start)
            torch.testing.assert_close(sums[0].reap, sums[1].reap, rtol=1e-5, atol=0)
        routed, every = (statistics.median(times[way]) for way in ways)
        limit = num_experts / (2 * top_k)
        failed |= every / routed < limit
        print(
            f"{name:12}{num_experts:8}{top_k:6}{routed:10.3f}{every:10.3f}{every / routed:8.1f}"
            f"{limit:8.1f}"
        )
    sys.exit("a ratio is below its limit" if failed else 0)


if __name__ == "__main__":
    main()
