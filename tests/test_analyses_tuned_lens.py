import numpy as np
import pandas as pd
import pytest
import torch

import deviants_zoo
import models_zoo
import moescope
from evaluate_zoo import every_prediction, random_documents
from moescope.analyses.material import Material
from moescope.analyses.tuned_lens.analysis import judged, trained, tuned_lens
from moescope.analyses.tuned_lens.options import TunedLensOptions, operations
from moescope.corpora.corpus import Corpus
from moescope.corpora.packing import Packing
from moescope.decoding.training import fit
from moescope.decoding.training_states import belongs
from moescope.decoding.translators import Translators
from moescope.errors import CorpusError, ModelError
from moescope.models.discover import moe_layers
from moescope.models.load import load
from moescope.models.view import MoEModel
from moescope.reports.registry import chapter

OPTIONS = TunedLensOptions(steps=6, checks=2, bootstrap=50)


def text(documents=20, **packing):
    given = {"first": random_documents(documents, 0), "second": random_documents(documents, 1)}
    return Corpus.from_token_ids(given, Packing(length=16, rows=8, **packing))


@pytest.fixture(scope="module")
def model():
    return load(models_zoo.build("qwen2_moe", num_hidden_layers=3))


@pytest.fixture(scope="module")
def translators(model):
    return fit(model, text(), OPTIONS)


@pytest.fixture(scope="module")
def result(model, translators):
    return judged(model, text(), translators, OPTIONS)


def row(table, **chosen):
    for name, value in ({"domain": "all"} | chosen).items():
        table = table[table[name] == value]
    assert len(table) == 1
    return table.iloc[0]


def states_one_by_one(model, corpus, part):
    """(states after every layer, target) of each prediction of a part, from plain passes."""
    with torch.no_grad():
        for batch in corpus.batches(None):
            for r, ids in enumerate(batch.input_ids):
                length = int(batch.attention_mask[r].sum())
                output = model.model(ids[None, :length], output_hidden_states=True)
                for p in range(length - 1):
                    document = batch.documents[r, p : p + 1]
                    inside = document == batch.documents[r, p + 1]
                    if batch.kept[r, p] and inside and belongs(document, part, 0):
                        hidden = [h[0, p] for h in output.hidden_states[1:-1]]
                        yield hidden, int(ids[p + 1]), output.logits[0, p].double().log_softmax(-1)


def test_numbers_are_those_of_a_direct_computation(model, translators, result):
    network = model.model
    found = {(lens, layer): [] for lens in ("logit", "tuned") for layer in (0, 1)}
    for hidden, target, final in states_one_by_one(model, text(), "held_out"):
        for layer in (0, 1):
            h = hidden[layer]
            moved = h + translators.weights[layer] @ h + translators.biases[layer]
            for lens, state in {"logit": h, "tuned": moved}.items():
                own = network.lm_head(network.model.norm(state)).detach().double().log_softmax(-1)
                kl = float((final.exp() * (final - own)).sum())
                agrees = float(own.argmax() == final.argmax())
                found[lens, layer].append((kl, agrees, -float(own[target])))
    for (lens, layer), values in found.items():
        expected = np.mean(values, 0)
        told = row(result.table, lens=lens, layer=layer)
        assert told.n_tokens == len(values)
        assert [told.kl, told.agreement, told.loss] == pytest.approx(expected, rel=1e-4)
    gain = row(result.tables["gains"], against="logit", layer=0)
    means = {lens: np.mean(found[lens, 0], 0) for lens in ("logit", "tuned")}
    expected = means["tuned"] - means["logit"]
    assert [gain.kl, gain.agreement, gain.loss] == pytest.approx(expected, rel=1e-3)


def test_the_controls_are_means_over_training_documents(model, result):
    """Positions at the end of a document have no target, but count in the means."""
    predictions = []
    with torch.no_grad():
        for batch in text().batches(None):
            output = model.forward(batch.input_ids, batch.attention_mask, head=True)
            chosen = batch.kept.clone()
            chosen[batch.kept] = belongs(batch.documents[batch.kept], "training", 0)
            predictions.append(output.logits[chosen].softmax(-1))
    assert result.provenance["control_tokens"] == len(torch.cat(predictions))
    constant = torch.cat(predictions).mean(0).double().log()
    found = [
        float((final.exp() * (final - constant)).sum())
        for _, _, final in states_one_by_one(model, text(), "held_out")
    ]
    assert row(result.table, lens="constant").kl == pytest.approx(np.mean(found), rel=1e-4)


def test_the_model_itself_and_its_last_layer_are_exact(model, result):
    nll = [
        -float(logs[target])
        for _, document, target, logs in every_prediction(model, text())
        if belongs(torch.tensor([document]), "held_out", 0)
    ]
    for chosen in ({"lens": "model"}, {"lens": "logit", "layer": 2}, {"lens": "tuned", "layer": 2}):
        told = row(result.table, **chosen)
        assert (told.kl, told.agreement) == (0, 1)
        assert told.loss == pytest.approx(np.mean(nll), rel=1e-5)


def test_domains_and_documents_add_up(result):
    held_out = int(belongs(torch.arange(40), "held_out", 0).sum())
    parts = result.table[(result.table.lens == "tuned") & (result.table.layer == 0)]
    parts = parts.set_index("domain")
    assert parts.n_documents["all"] == held_out == 8
    for count in ("n_documents", "n_tokens"):
        assert parts[count]["first"] + parts[count]["second"] == parts[count]["all"]
    assert set(parts.status) == {"few_documents"}


def test_training_helps_where_something_is_to_be_gained(result):
    gains = result.tables["gains"]
    gains = gains[(gains.domain == "all") & (gains.against == "logit")].set_index("layer")
    assert (gains.kl[[0, 1]] < 0).all()
    assert result.findings[0].numbers["layer"] == gains.kl.idxmin()
    assert f"{-gains.kl.min():.3f}" in result.findings[0].text


def test_translators_are_kept_and_used_again(model, tmp_path, monkeypatch):
    moescope.capture(model, text(6), tmp_path, record=("routing",))
    result = tuned_lens(tmp_path, model=model, corpus=text(6), steps=2, checks=1, bootstrap=5)
    folder = tmp_path / "translators"
    kept = Translators.load(folder)
    kept.require_model(model)
    assert kept.training["tokens"] == result.provenance["training_tokens"] > 0
    trainings = []
    monkeypatch.setattr(
        "moescope.analyses.tuned_lens.analysis.fit",
        lambda *arguments: trainings.append(arguments) or fit(*arguments),
    )
    again = tuned_lens(tmp_path, model=model, corpus=text(6), steps=2, checks=1, bootstrap=6)
    assert not trainings
    material = Material(tmp_path, model, text(6))
    done = TunedLensOptions(steps=2, checks=1, bootstrap=6)
    assert tuned_lens.is_done(material, done)
    (folder / "translators.json").rename(tmp_path / "away")
    assert not tuned_lens.is_done(material, done)
    (tmp_path / "away").rename(folder / "translators.json")
    columns = ["lens", "kl", "agreement", "loss"]
    pd.testing.assert_frame_equal(result.table[columns], again.table[columns])
    other = TunedLensOptions(steps=1, checks=1)
    trained(model, text(6), other, folder)
    assert len(trainings) == 1
    trained(model, text(6).limited(150), other, folder)
    assert len(trainings) == 2
    (folder / "translators.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match="delete"):
        trained(model, text(6).limited(150), other, folder)


def test_an_interrupted_training_leaves_nothing(model, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("moescope.analyses.tuned_lens.analysis.fit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trained(model, text(), OPTIONS, tmp_path / "translators")
    assert not list(tmp_path.iterdir())


def test_an_encoder_decoder_is_judged_without_a_loss():
    model = load(deviants_zoo.switch())
    options, corpus = TunedLensOptions(steps=1, checks=1, bootstrap=50), text(5)
    result = judged(model, corpus, fit(model, corpus, options), options)
    decoder = {layer.index for layer in model.layers if layer.stack == "decoder"}
    assert set(result.table.layer.dropna()) == decoder
    assert "loss" not in result.table


def test_models_whose_states_cannot_be_decoded_are_refused():
    network = deviants_zoo.DEVIANTS["deepseek_v4"]()
    model = MoEModel(model=network, tokenizer=None, layers=moe_layers(network), name="in memory")
    with pytest.raises(ModelError, match="several streams"):
        fit(model, text(), OPTIONS)


def test_too_few_documents_are_refused(model):
    with pytest.raises(CorpusError, match="part"):
        fit(model, Corpus.from_token_ids({"a": [[5, 6, 7, 8]]}), OPTIONS)


def test_the_curve_is_that_of_the_tuned_lens(result):
    (curve,) = tuned_lens.curves
    frame = curve.read(result)
    assert frame["layer"].tolist() == [0, 1, 2]
    assert frame["value"][0] == row(result.table, lens="tuned", layer=0).kl


def test_figures_and_work(model, result):
    drawn = chapter("tuned-lens").draw(result)
    names = [figure.name for figure in drawn]
    assert names == ["tuned-lens-layers", "tuned-lens-gain", "tuned-lens-training"]
    for figure in drawn:
        assert figure.specification()["datasets"]
        assert figure.title.endswith("?")
    assert set(result.table.columns) >= {"kl_low", "loss_high", "n_documents", "seed"}
    assert operations(model, OPTIONS) < operations(model, TunedLensOptions())
