"""Paired comparison: exact zeros, planted answers, intervals, and what is held in memory."""

import math
import weakref
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from importlib import import_module

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import moescope
from evaluate_zoo import PACKING, every_prediction, scaled_blocks, shifted, small_corpus
from models_zoo import VOCABULARY, build
from moescope.errors import ModelError, OptionError
from moescope.evaluate import predictions
from moescope.evaluate.predictions import Targets
from moescope.evaluate.totals import Resampling, difference_reach


@pytest.fixture(scope="module")
def model():
    return moescope.load(build("qwen2_moe"))


def test_identity_changes_exactly_nothing(model):
    table = moescope.evaluate.compare(model, small_corpus(), {"nothing": nullcontext})
    same = table.set_index(["intervention", "domain"]).loc["nothing"]
    assert (same.difference == 0).all()
    assert (same.kl == 0).all()
    assert (same.flips == 0).all()
    assert same.difference_low["all"] == same.difference_high["all"] == 0
    alone = moescope.evaluate.loss(model, small_corpus()).set_index("domain")
    np.testing.assert_allclose(same.loss, alone.loss, rtol=1e-6)


def test_planted_divergence(model):
    """KL(p || q) of one logit moved by c: log(1 + p_v (e^c - 1)) - c p_v."""
    token, shift = 7, 1.5
    corpus = small_corpus()
    table = moescope.evaluate.compare(model, corpus, {"shift": shifted(model, token, shift)})
    found = table[(table.intervention == "shift") & (table.domain == "all")].iloc[0]
    kl, difference, flips = [], [], []
    for _, _, target, logs in every_prediction(model, corpus):
        p = logs[token].exp().item()
        norm = math.log1p(p * math.expm1(shift))
        kl.append(norm - shift * p)
        difference.append(norm - shift * (target == token))
        moved = logs.clone()
        moved[token] += shift
        flips.append(moved.argmax() != logs.argmax())
    assert found.kl == pytest.approx(np.mean(kl), rel=1e-4)
    assert found.difference == pytest.approx(np.mean(difference), rel=1e-4)
    assert found.flips == pytest.approx(np.mean(flips), abs=1e-9)
    assert 0 < found.flips < 1
    assert found.kl_low < found.kl < found.kl_high
    assert found.difference_low < found.difference < found.difference_high


def test_differences_are_those_of_two_separate_losses(model):
    corpus, change = small_corpus(), scaled_blocks(model, 0.3)
    table = moescope.evaluate.compare(
        model, corpus, {"scaled": change, "off": scaled_blocks(model, 0)}
    )
    found = table.set_index(["intervention", "domain"])
    before = moescope.evaluate.loss(model, corpus).set_index("domain")
    with change():
        after = moescope.evaluate.loss(model, corpus).set_index("domain")
    for domain in ("all", "first", "second"):
        row = found.loc["scaled", domain]
        assert row.loss == pytest.approx(after.loss[domain], rel=1e-6)
        assert row.difference == pytest.approx(after.loss[domain] - before.loss[domain], abs=1e-5)
        assert row.n_tokens == before.n_tokens[domain]
    assert found.index.get_level_values(0).unique().tolist() == ["baseline", "scaled", "off"]
    # Pairing pays: the interval of the difference is narrower than that of either loss.
    row = found.loc["scaled", "all"]
    assert row.difference_high - row.difference_low < row.loss_high - row.loss_low


def test_chunks_change_nothing_and_bound_what_is_computed_at_once(model, monkeypatch):
    corpus, change = small_corpus(), {"scaled": scaled_blocks(model, 0.3)}
    whole = moescope.evaluate.compare(model, corpus, change)
    monkeypatch.setattr(predictions, "_VALUES_AT_ONCE", 5 * VOCABULARY)
    batch = next(corpus.batches(None))
    sizes = [len(ids) for _, ids in Targets.of(batch, torch.device("cpu")).chunks(VOCABULARY)]
    assert max(sizes) == 5
    chunked = moescope.evaluate.compare(model, corpus, change)
    np.testing.assert_allclose(chunked[["loss", "kl"]], whole[["loss", "kl"]], rtol=1e-5)


class LargestPrecise(TorchDispatchMode):
    """Notes the most rows of fp32 values over the vocabulary that one operation makes."""

    rows = 0

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        made = function(*arguments, **(named or {}))
        if not isinstance(made, torch.Tensor) or made.dtype != torch.float32:
            return made
        if made.shape[-1:] == (VOCABULARY,):
            self.rows = max(self.rows, made.numel() // VOCABULARY)
        return made


def test_no_more_than_a_chunk_of_logits_is_ever_in_fp32(monkeypatch):
    model = moescope.load(build("qwen2_moe").to(torch.bfloat16))
    monkeypatch.setattr(predictions, "_VALUES_AT_ONCE", 5 * VOCABULARY)
    corpus = small_corpus(replace(PACKING, max_tokens=80))
    with LargestPrecise() as seen:
        moescope.evaluate.loss(model, corpus)
        assert seen.rows == 5
        moescope.evaluate.compare(model, corpus, {"scaled": scaled_blocks(model, 0.3)})
        assert seen.rows == 5


@pytest.mark.parametrize(("module", "most"), [("unpaired", 0), ("paired", 1)])
def test_logits_of_earlier_batches_are_gone(model, monkeypatch, module, most):
    room = import_module(f"moescope.evaluate.{module}")
    made, alive = [], []

    def watched(*arguments):
        alive.append(sum(reference() is not None for reference in made))
        logits = predictions.forward(*arguments)
        made.append(weakref.ref(logits))
        return logits

    monkeypatch.setattr(room, "forward", watched)
    if module == "unpaired":
        moescope.evaluate.loss(model, small_corpus())
    else:
        change = scaled_blocks(model, 0.3)
        moescope.evaluate.compare(model, small_corpus(), {"a": change, "b": change})
    assert len(made) > 5
    assert max(alive) == most


def test_a_change_that_stays_is_refused():
    model = moescope.load(build("qwen2_moe"))

    @contextmanager
    def forgetful():
        with torch.no_grad():
            model.model.lm_head.weight.mul_(0.5)
        yield

    with pytest.raises(ModelError, match="did not restore"):
        moescope.evaluate.compare(model, small_corpus(), {"forgetful": forgetful})


def test_refusals(model):
    corpus = small_corpus()
    with pytest.raises(OptionError, match="baseline"):
        moescope.evaluate.compare(model, corpus, {"baseline": nullcontext})
    with pytest.raises(OptionError, match="Put `lambda:` before it"):
        moescope.evaluate.speed(model, {"entered": scaled_blocks(model, 1)()})
    with pytest.raises(AttributeError, match="no attribute 'perplexity'"):
        moescope.evaluate.perplexity  # noqa: B018


def test_reach_against_a_direct_loop():
    random = np.random.default_rng(0)
    tokens = random.integers(5, 200, 40).astype(float)
    sums = random.normal(0.02, 0.1, 40) * tokens
    mean = sums.sum() / tokens.sum()

    def estimate(drawn):
        ratio = sums[drawn].sum() / tokens[drawn].sum()
        residuals = sums[drawn] - ratio * tokens[drawn]
        return ratio, math.sqrt((residuals**2).sum()) / tokens[drawn].sum()

    counts = np.random.default_rng(5).multinomial(40, np.full(40, 1 / 40), size=300)
    distances = []
    for count in counts:
        ratio, error = estimate(np.repeat(np.arange(40), count))
        distances.append(abs(ratio - mean) / error)
    expected = np.quantile(distances, 0.95) * estimate(np.arange(40))[1]
    found = difference_reach(sums, tokens, Resampling(resamples=300, seed=5))
    assert found == pytest.approx(expected)


def test_reach_covers_the_truth():
    """1,000 draws of 60 documents of uneven length; differences by document and by token."""
    random, resampling, held = np.random.default_rng(1), Resampling(resamples=500, seed=0), 0
    for _ in range(1_000):
        tokens = np.maximum(5, random.lognormal(4, 0.8, 60)).round()
        sums = tokens * random.normal(0.01, 0.05, 60) + np.sqrt(tokens) * random.normal(0, 0.3, 60)
        held += abs(sums.sum() / tokens.sum() - 0.01) <= difference_reach(sums, tokens, resampling)
    assert 0.935 <= held / 1_000 <= 0.98


def test_one_document_that_changed_is_not_blown_up_by_rounding():
    tokens = np.random.default_rng(0).integers(100, 900, 70).astype(float)
    sums = np.zeros(70)
    sums[3] = 1e-3
    mean = sums.sum() / tokens.sum()
    reach = difference_reach(sums, tokens, Resampling(resamples=1_000, seed=0))
    assert mean < reach < 3 * mean


def test_reach_without_spread_and_under_thirty():
    tokens = np.full(40, 7.0)
    assert difference_reach(0 * tokens, tokens, Resampling(resamples=100, seed=0)) == 0
    assert math.isnan(difference_reach(tokens[:29], tokens[:29], Resampling(resamples=9, seed=0)))
