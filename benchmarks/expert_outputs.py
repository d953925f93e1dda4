"""The outputs of all experts for every token: against one forward pass per layer, and memory.

    python benchmarks/expert_outputs.py speed [--layers 16] [--tokens 512]
    python benchmarks/expert_outputs.py memory [--tokens 8192]

`speed` times, in turns on one thread and by processor time, how alike the outputs of all experts
are in every layer of a random model: a capture to disk with one pass over its inputs per layer as
`outputs` has it (means first, then cosine, centred cosine, angular similarity, norms, by chosen and
not), against the procedure of A Closer Look into MoE written out plainly: one forward pass of the
model per layer, whose block is patched to keep the outputs of all its experts, and loops over
tokens and pairs of experts for the angular similarity alone. At least 5 times as fast is asked
for. Beside it the same forward passes with all pairs of a token at once in place of the loops.

`memory` measures one layer whose outputs would take about 540 MB for all tokens at once, in fp32,
and asks for a peak of anonymous memory (Linux only) of at most 400 MB above what was there before.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import moescope
from capture_memory import Watch
from moescope.analyses.outputs.one_pass import Recorded, measured
from moescope.captures.read import Capture
from moescope.corpora.corpus import Corpus
from moescope.corpora.packing import Packing
from moescope.models.view import MoELayer, MoEModel

LIMIT = 5.0
LIMIT_MB = 400.0
LENGTH, VOCABULARY, REPEATS = 64, 512, 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("step", choices=["speed", "memory"])
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--tokens", type=int)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.step == "speed":
        sys.exit("slower than asked for" if speed(options.layers, options.tokens or 512) else 0)
    sys.exit("memory is above the limit" if memory(options.tokens or 8192) else 0)


def build(*, layers: int, experts: int, hidden: int) -> MoEModel:
    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        moe_intermediate_size=hidden // 2,
        num_hidden_layers=layers,
        num_experts=experts,
        num_experts_per_tok=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
    )
    torch.manual_seed(0)
    return moescope.load(Qwen3MoeForCausalLM(config))


def text(tokens: int) -> Corpus:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(3, VOCABULARY, (tokens // LENGTH, LENGTH), generator=generator).tolist()
    return Corpus.from_token_ids({"random": rows}, Packing(length=LENGTH, skip_first=False))


def speed(layers: int, tokens: int) -> bool:
    model, corpus = build(layers=layers, experts=8, hidden=64), text(tokens)
    found: dict[str, list[Tensor]] = {}
    ways: dict[str, Callable[[], list[Tensor]]] = {
        "ours": lambda: ours(model, corpus),
        "published": lambda: published(model, corpus, looped),
        "no loops": lambda: published(model, corpus, at_once),
    }
    times: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(REPEATS):
        for way, run in ways.items():
            start = time.process_time()
            found[way] = run()
            times[way].append(time.process_time() - start)
    apart = max(
        float((one - other).abs().max())
        for one, other in zip(found["ours"], found["published"], strict=True)
    )
    print(f"{layers} layers, 8 experts, {tokens} tokens; results differ by at most {apart:.1e}")
    assert apart < 1e-4
    seconds = {way: statistics.median(values) for way, values in times.items()}
    for way, asked in (("published", f"at least {LIMIT:.0f}"), ("no loops", "")):
        ratio = seconds[way] / seconds["ours"]
        print(f"{way:12}{seconds[way]:8.2f} s {seconds['ours']:8.2f} s {ratio:8.1f} times  {asked}")
    return seconds["published"] / seconds["ours"] < LIMIT


def ours(model: MoEModel, corpus: Corpus) -> list[Tensor]:
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        record(model, corpus, folder)
        capture = Capture(folder)
        return [
            measured(capture, layer, Recorded.of(capture, layer.index)).pairs["all"][2]
            for layer in model.layers
        ]


def record(model: MoEModel, corpus: Corpus, folder: str) -> None:
    moescope.capture(
        model, corpus, folder, record=("routing", "inputs"), tokens=10**9, tokens_per_expert=0
    )


def published(
    model: MoEModel, corpus: Corpus, similarity: Callable[[Tensor], Tensor]
) -> list[Tensor]:
    """One forward pass over the text per layer."""
    means = []
    for layer in model.layers:
        kept: list[Tensor] = []
        forward = layer.block.forward
        layer.block.forward = patched(layer, forward, kept)
        with torch.no_grad():
            for batch in corpus.batches(None):
                model.forward(batch.input_ids, batch.attention_mask)
        layer.block.forward = forward
        outputs = torch.cat(kept, dim=1)
        means.append(similarity(outputs) / outputs.shape[1])
    return means


def patched(
    layer: MoELayer, forward: Callable[[Tensor], Tensor], kept: list[Tensor]
) -> Callable[[Tensor], Tensor]:
    """The block, which keeps the outputs of all its experts beside what it does."""

    def keeping(x: Tensor) -> Tensor:
        rows = x.flatten(0, 1)
        kept.append(layer.expert_outputs(rows, range(layer.num_experts)))
        return forward(x)

    return keeping


def looped(outputs: Tensor) -> Tensor:
    """Sums over tokens, one pair of experts of one token at a time."""
    cosine = nn.CosineSimilarity(dim=0)
    experts, tokens, _ = outputs.shape
    sums = torch.ones(experts, experts, dtype=torch.float64) * tokens
    for one in range(experts):
        for other in range(one):
            total = 0.0
            for token in range(tokens):
                angle = cosine(outputs[one, token], outputs[other, token]).clamp(-1, 1).acos()
                total += 1 - float(angle) / torch.pi
            sums[one, other] = sums[other, one] = total
    return sums


def at_once(outputs: Tensor) -> Tensor:
    """The same, all pairs of all tokens together."""
    rows = nn.functional.normalize(outputs, dim=2).transpose(0, 1)
    angles = (rows @ rows.mT).clamp(-1, 1).acos()
    return (1 - angles / torch.pi).sum(0, dtype=torch.float64)


def memory(tokens: int) -> bool:
    model, corpus = build(layers=1, experts=32, hidden=512), text(tokens)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        record(model, corpus, folder)
        capture = Capture(folder)
        with Watch() as watch:
            start = watch.peak
            measured(capture, model.layers[0], Recorded.of(capture, 0))
    rise, whole = watch.peak - start, 32 * tokens * 512 * 4 / 1e6
    print(f"outputs of all tokens {whole:,.0f} MB; peak {rise:,.0f} MB, at most {LIMIT_MB:.0f}")
    return rise > LIMIT_MB


if __name__ == "__main__":
    main()
