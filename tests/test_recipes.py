"""The relatives of `tiny` that come with their recipe: whole, small, and what their card says."""

from pathlib import Path

import pytest
import torch

import moescope
from moescope.corpora.packing import Packing

FOLDER = Path(__file__).parents[1] / "recipes/relatives/checkpoints"
FILES = {
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
}
# Experts, experts per token and neurons of an expert.
SHAPES = {"dense": (1, 1, 128), "small": (8, 2, 128), "split": (8, 2, 16), "upcycled": (8, 2, 128)}
# Nats per token on the first 12,000 tokens of the built-in corpus, rows of 256.
LOSSES = {"dense": 5.0130, "small": 4.3899, "split": 4.9648, "upcycled": 4.8317}


def opened(name):
    return moescope.load(FOLDER / name, dense_as_experts=name == "dense")


@pytest.mark.parametrize("name", sorted(SHAPES))
def test_a_shipped_relative_is_small_and_predicts_as_it_did(name):
    sizes = {path.name: path.stat().st_size for path in (FOLDER / name).iterdir()}
    assert set(sizes) == FILES
    assert sum(sizes.values()) < 2_600_000
    model = opened(name)
    shapes = {(layer.num_experts, layer.top_k, layer.intermediate_size) for layer in model.layers}
    assert shapes == {SHAPES[name]}
    corpus = moescope.Corpus.builtin(Packing(max_tokens=12_000))
    table = moescope.evaluate.loss(model, corpus, bootstrap=10)
    assert table.loss[0] == pytest.approx(LOSSES[name], abs=0.005)


def test_conversion_left_its_mark_on_the_weights():
    """Upcycled experts stay near their ancestor's layer; those from random weights are apart."""
    dense, found = opened("dense").layers, {}
    for name in ("upcycled", "small"):
        gates = [
            (layer.expert_weights(expert).gate, dense[layer.index].expert_weights(0).gate)
            for layer in opened(name).layers
            for expert in range(layer.num_experts)
        ]
        cosines = [
            torch.cosine_similarity(a.float().flatten(), b.float().flatten(), dim=0)
            for a, b in gates
        ]
        found[name] = [float(cosine) for cosine in cosines]
    assert min(found["upcycled"]) > 0.9
    assert max(map(abs, found["small"])) < 0.1
