"""What the cost model of `atlas` is worth, and what it predicts for a large model.

    python benchmarks/atlas.py [--hidden 64 128 256] [--targets 4] [--steps 20]

For experts of several shapes: CPU seconds of pairs with controls, measured, and as the model
predicts them from a few timed steps of fits of that shape (`own`) and of the first shape (`first`).
One thread, one imitated expert, made-up tensors. Then the plan for Qwen1.5-MoE-A2.7B, 24 layers of
60 experts: the GPU's rate is an assumption.
"""

import argparse
import time
from dataclasses import replace

import torch

from moescope.alignment.pairs import fit_pairs
from moescope.alignment.samples import Samples
from moescope.analyses.atlas.cost import Shape, pair_operations, source_operations
from moescope.analyses.atlas.options import AtlasOptions
from moescope.analyses.atlas.plan import plan_of, timed_rate
from synthetic import expert, inputs

QWEN = [Shape(experts=60, hidden=2048, wide=1408)] * 24
DOCUMENTS = 200


def measured(shape: Shape, targets: int, options: AtlasOptions) -> float:
    """CPU seconds of one imitated expert against so many targets, with controls."""
    source = expert(shape.hidden, shape.wide, 0)
    x = inputs(options.max_tokens, shape.hidden, 0)
    everything = Samples(x, source(x), torch.arange(len(x)) * DOCUMENTS // len(x))
    held = everything.documents >= round((1 - options.held_out_share) * DOCUMENTS)
    start = time.process_time()
    fit_pairs(
        everything.where(~held),
        everything.where(held),
        {str(i): expert(shape.hidden, shape.wide, i + 1) for i in range(targets)},
        source=source,
        options=options.converged_fit(),
    )
    return time.process_time() - start


def predicted(shape: Shape, targets: int, options: AtlasOptions) -> float:
    """Floating-point operations of the same."""
    train = round((1 - options.held_out_share) * options.max_tokens)
    pairs = targets * pair_operations(shape, options, train)
    return pairs + source_operations(shape, [shape], options, train)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--hidden", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--targets", type=int, default=4)
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    options = AtlasOptions(steps=arguments.steps)
    columns = ("hidden", "wide", "measured", "own", "ratio", "first", "ratio")
    print("".join(f"{column:>12}" for column in columns))
    first = None
    for hidden in arguments.hidden:
        shape = Shape(experts=0, hidden=hidden, wide=hidden * 3 // 4)
        measured(shape, 1, replace(options, steps=1))  # warm
        rate = timed_rate(shape, options)
        first = first or rate
        took = measured(shape, arguments.targets, options)
        need = predicted(shape, arguments.targets, options)
        cells = [f"{took:.1f} s"]
        for one in (rate, first):
            cells += [f"{need / one:.1f} s", f"{need / one / took:.2f}"]
        print("".join(f"{cell:>12}" for cell in (hidden, shape.wide, *cells)), flush=True)
    options = AtlasOptions(experts_per_layer=None, max_tokens=5_000)
    print(plan_of("Qwen1.5-MoE-A2.7B, all experts", QWEN, options))
    options = replace(options, experts_per_layer=8)
    print(plan_of("Qwen1.5-MoE-A2.7B, 8 experts of each layer", QWEN, options))


if __name__ == "__main__":
    main()
