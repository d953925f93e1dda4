"""Loss by domain: against a plain loop, and which predictions count."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import deviants_zoo
import moescope
from evaluate_zoo import PACKING, every_prediction, small_corpus
from models_zoo import build
from moescope.corpora.packing import Packing
from moescope.errors import CorpusError, ModelError
from moescope.evaluate.predictions import Targets, evaluating
from moescope.measures.bootstrap import ratio_interval


@pytest.fixture(scope="module")
def model():
    return moescope.load(build("qwen2_moe"))


@pytest.mark.parametrize("packed", [True, False])
def test_loss_against_a_plain_loop(model, packed):
    corpus = small_corpus(replace(PACKING, packed=packed))
    found = moescope.evaluate.loss(model, corpus).set_index("domain")
    by_domain = {"first": [], "second": []}
    documents = set()
    for domain, document, target, logs in every_prediction(model, corpus):
        by_domain[["first", "second"][domain]].append(-logs[target].item())
        documents.add(document)
    by_domain["all"] = by_domain["first"] + by_domain["second"]
    for domain, losses in by_domain.items():
        assert found.loss[domain] == pytest.approx(np.mean(losses), rel=1e-5)
        assert found.perplexity[domain] == pytest.approx(math.exp(np.mean(losses)), rel=1e-4)
        assert found.n_tokens[domain] == len(losses)
    assert found.n_documents["all"] == len(documents)
    assert list(found.index) == ["all", "first", "second"]


def test_interval_is_over_documents_and_absent_under_thirty(model):
    corpus = small_corpus()
    found = moescope.evaluate.loss(model, corpus, bootstrap=500, seed=3).set_index("domain")
    sums, sizes = {}, {}
    for domain, document, target, logs in every_prediction(model, corpus):
        if domain == 0:
            sums[document] = sums.get(document, 0.0) - logs[target].item()
            sizes[document] = sizes.get(document, 0) + 1
    numbers = sorted(sums)
    low, high = ratio_interval(
        np.array([[sums[n]] for n in numbers]),
        np.array([float(sizes[n]) for n in numbers]),
        resamples=500,
        seed=3,
    )
    row = found.loc["first"]
    assert (row.loss_low, row.loss_high) == (
        pytest.approx(low[0], rel=1e-5),
        pytest.approx(high[0], rel=1e-5),
    )
    assert row.perplexity_high == pytest.approx(math.exp(row.loss_high))
    assert (row.status, row.seed) == ("ok", 3)
    few = found.loc["second"]
    assert few.status == "few_documents"
    assert few.n_documents <= 5
    assert np.isnan([few.loss_low, few.perplexity_high]).all()
    assert np.isfinite(few.loss)


def test_which_predictions_count_by_hand():
    documents = {"only": [[10, 11, 12], [13, 14, 15, 16]]}
    corpus = moescope.Corpus.from_token_ids(documents, Packing(length=5, rows=2, shuffle=0))
    # Rows: 10 11 12 13 14 | 15 16 and three of padding. No first positions, none across documents.
    batch = next(corpus.batches(None))
    found = Targets.of(batch, torch.device("cpu"))
    assert found.positions.tolist() == [1, 3]  # 11 predicts 12, 13 predicts 14; 15 is first
    assert found.ids.tolist() == [12, 14]
    assert found.documents.tolist() == [0, 1]
    everything = Packing(length=5, rows=2, shuffle=0, skip_first=False)
    batch = next(moescope.Corpus.from_token_ids(documents, everything).batches(None))
    assert Targets.of(batch, torch.device("cpu")).ids.tolist() == [11, 12, 14, 16]


def test_padding_is_no_target_even_where_it_is_kept():
    documents = {"only": [[10, 11, 12]]}
    packing = Packing(length=6, rows=1, packed=False, keep_padding=True)
    batch = next(moescope.Corpus.from_token_ids(documents, packing).batches(None))
    assert batch.kept.sum() == 5
    assert Targets.of(batch, torch.device("cpu")).ids.tolist() == [12]


def test_the_end_token_counts_as_part_of_its_document():
    model = moescope.load("tiny", dtype="float32")
    corpus = moescope.Corpus.builtin(Packing(max_tokens=4_000))
    end = model.tokenizer.eos_token_id
    ids, documents = [], []
    for batch in corpus.batches(model.tokenizer):
        targets = Targets.of(batch, torch.device("cpu"))
        ids += targets.ids.tolist()
        documents += targets.documents.tolist()
        flat = batch.input_ids.flatten()
        assert end not in flat[targets.positions].tolist()  # nothing is predicted from it
    assert ids.count(end) >= 3


def test_agrees_with_the_captured_token_loss(tmp_path):
    """Up to the predictions across documents, which a capture records and a loss leaves out."""
    model = moescope.load("tiny", dtype="float32")
    corpus = moescope.Corpus.builtin(Packing(max_tokens=3_000, packed=False))
    capture = moescope.capture(model, corpus, tmp_path, record=["token_loss"])
    recorded = capture.token_loss
    recorded = recorded[recorded.isfinite()].double()
    found = moescope.evaluate.loss(model, corpus).iloc[0]
    assert found.n_tokens == len(recorded)
    assert found.loss == pytest.approx(recorded.mean().item(), rel=1e-6)


def test_encoder_decoders_are_refused():
    model, corpus = moescope.load(deviants_zoo.switch()), small_corpus()
    for name, arguments in (("loss", [corpus]), ("compare", [corpus, {}]), ("speed", [])):
        with pytest.raises(ModelError, match="encoder-decoder"):
            getattr(moescope.evaluate, name)(model, *arguments)


def test_training_mode_and_gradients_come_back(model):
    model.model.train()
    try:
        with evaluating(model):
            assert not model.model.training
            assert not torch.is_grad_enabled()
        assert model.model.training
        assert torch.is_grad_enabled()
    finally:
        model.model.eval()


def test_a_corpus_without_predictions_is_refused(model):
    one = moescope.Corpus.from_token_ids({"only": [[5]]}, PACKING)
    with pytest.raises(CorpusError, match="no prediction"):
        moescope.evaluate.loss(model, one)
