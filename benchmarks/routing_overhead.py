"""What `routing` costs on top of a plain forward pass of the same model and the same batches.

    python benchmarks/routing_overhead.py [--model tiny | wide] [--repeats 3] [--max-tokens 60000]

The runs are interleaved and their medians compared. `routing` is a capture of routing alone and
the whole analysis: counting, 1,000 shuffles, 1,000 resamples, tables, saving. A plain pass is
nothing but `model(input_ids, attention_mask)` for batches that are ready, without the head. `wide`
is a random model of 64 experts, 8 of them per token, and a hidden size of 512. Resampling and
shuffling cost the same for any number of tokens, so that a longer text makes the ratio smaller.
"""

import argparse
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import moescope
from capture_overhead import as_token_ids, plain, seconds
from moescope.corpora.packing import Packing
from moescope.models.view import MoEModel

LIMIT = 1.20


def wide(layers: int, vocabulary: int) -> MoEModel:
    """A random model whose experts do most of the work."""
    config = Qwen3MoeConfig(
        vocab_size=vocabulary,
        hidden_size=512,
        intermediate_size=1024,
        moe_intermediate_size=512,
        num_hidden_layers=layers,
        num_experts=64,
        num_experts_per_tok=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
    )
    torch.manual_seed(0)
    return moescope.load(Qwen3MoeForCausalLM(config))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=["tiny", "wide"], default="tiny")
    parser.add_argument("--layers", type=int, default=4, help="of the wide model")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--max-tokens", type=int, default=60_000)
    options = parser.parse_args()
    reader = moescope.load("tiny")
    corpus = as_token_ids(reader, Packing(max_tokens=options.max_tokens))
    vocabulary = len(reader.tokenizer)  # type: ignore[arg-type]
    model = reader if options.model == "tiny" else wide(options.layers, vocabulary)
    batches = list(corpus.batches(None))
    plain(model, batches[:2], head=False)
    times: dict[str, list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for repeat in range(options.repeats):
            out = Path(folder) / str(repeat)
            steps: dict[str, Callable[[], object]] = {
                "plain": lambda: plain(model, batches, head=False),
                "capture": lambda out=out: moescope.capture(
                    model, corpus, out, record=("routing",)
                ),
                "analysis": lambda out=out: moescope.routing(out, model=model),
            }
            for name, step in steps.items():
                times.setdefault(name, []).append(seconds(step))
    elapsed, processor = (
        {name: statistics.median(pair[which] for pair in pairs) for name, pairs in times.items()}
        for which in (0, 1)
    )
    print(f"{model}\n{options.max_tokens} tokens, {options.repeats} repeats")
    print(f"{torch.get_num_threads()} threads of {os.cpu_count()} CPUs\n")
    print(f"{'':12}{'median s':>10}{'of plain':>10}{'processor s':>13}{'of plain':>10}")
    for each in (elapsed, processor):
        each["routing"] = each["capture"] + each["analysis"]
    for name in elapsed:
        ratios = [each[name] / each["plain"] for each in (elapsed, processor)]
        print(
            f"{name:12}{elapsed[name]:10.2f}{ratios[0]:10.2f}"
            f"{processor[name]:13.2f}{ratios[1]:10.2f}"
        )
    ratio = processor["routing"] / processor["plain"]
    sys.exit(f"{ratio:.2f} of a plain pass, more than {LIMIT}" if ratio > LIMIT else 0)


if __name__ == "__main__":
    main()
