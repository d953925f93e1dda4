"""The shipped model: small, offline, better than counting, and routed by domain."""

from importlib.resources import files

import pytest
import torch

import moescope
from moescope.corpora.packing import Packing

FOLDER = files("moescope") / "models" / "reference" / "tiny"
# Nats per token on the first 24,000 tokens of the built-in corpus, rows of 256.
LOSSES = {"encyclopedia": 4.8517, "maths": 2.9326, "code": 3.4372, "french": 3.6791}


@pytest.fixture(scope="module")
def captured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference")
    corpus = moescope.Corpus.builtin(Packing(max_tokens=24_000))
    model = moescope.load("tiny")
    return moescope.capture(model, corpus, folder, record=("routing", "token_loss")), folder, model


def test_it_is_small_and_holds_no_pickle():
    sizes = {path.name: path.stat().st_size for path in FOLDER.iterdir()}
    assert sizes["model.safetensors"] <= 8_000_000
    assert set(sizes) == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_its_loss_by_domain_is_unchanged(captured):
    capture, _, _ = captured
    losses = capture.token_loss
    for number, domain in enumerate(capture.domains):
        chosen = (capture.domain_of == number) & ~losses.isnan()
        assert losses[chosen].mean().item() == pytest.approx(LOSSES[domain], abs=0.005), domain


def test_its_domains_are_routed_apart(captured):
    _, folder, model = captured
    divergence = moescope.routing(folder, model=model, permutations=200).tables["divergence"]
    assert (divergence.js_bits > divergence.null_p95).all()
    top = divergence.iloc[int(divergence.js_bits.argmax())]
    assert (top.layer, {top.domain_a, top.domain_b}) == (0, {"maths", "french"})
    assert top.js_bits == pytest.approx(0.442, abs=0.005)


def test_it_generates_text_in_the_usual_way():
    model = moescope.load("tiny")
    tokens = model.tokenizer("The first", return_tensors="pt")
    output = model.model.generate(**tokens, max_new_tokens=5, do_sample=False)
    assert output.shape[1] == tokens["input_ids"].shape[1] + 5
    assert isinstance(model.tokenizer.decode(output[0]), str)
    assert model.dtype == torch.bfloat16
