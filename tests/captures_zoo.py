"""A small model in memory, a corpus of token ids with padding, and captures of them."""

import random
from pathlib import Path

import torch

import models_zoo
from moescope.captures.record import capture
from moescope.corpora.corpus import Corpus
from moescope.corpora.packing import Packing
from moescope.models.load import load
from moescope.models.observe import observe

ALL = ("routing", "inputs", "residual", "shared_output", "token_loss")
OPTIONS = {"record": ALL, "tokens": 60, "tokens_per_expert": 45, "shard_tokens": 64}


def model(family="qwen2_moe", **changes):
    return load(models_zoo.build(family, **changes))


def corpus(*, rows=3, documents=14, seed=0, **packing):
    """Two domains of unequal length, 12-token rows, the last ones padded."""
    source = random.Random(seed)

    def ids(number):
        return [
            [source.randrange(3, models_zoo.VOCABULARY) for _ in range(source.randrange(5, 40))]
            for _ in range(number)
        ]

    given = {"long": ids(documents), "short": ids(documents // 2)}
    return Corpus.from_token_ids(given, Packing(length=12, rows=rows, **packing))


def record(out, the_model=None, the_corpus=None, **changes):
    return capture(the_model or model(), the_corpus or corpus(), out, **(OPTIONS | changes))


def contents(folder):
    """Every file below a folder with its bytes."""
    folder = Path(folder)
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def seen(the_model, the_corpus):
    """What the layers do with every kept token, by plain forward passes."""
    layers, logits = {}, []
    found = {}

    def note(observation):
        found[observation.layer.index] = observation

    with observe(the_model.layers, note, residual=True), torch.inference_mode():
        for batch in the_corpus.batches(None):
            output = the_model.model(
                input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
            )
            kept = batch.kept.flatten()
            logits.append(output.logits.flatten(0, 1)[kept])
            for index, one in found.items():
                shared = one.layer.shared_output(one.input)
                parts = {
                    "experts": one.routing.experts,
                    "weights": one.routing.weights,
                    "logits": one.routing.logits,
                    "inputs": one.input,
                    "residual": one.residual,
                } | ({} if shared is None else {"shared_output": shared})
                for name, values in parts.items():
                    layers.setdefault((index, name), []).append(values[kept])
    return {key: torch.cat(parts) for key, parts in layers.items()}, torch.cat(logits)
