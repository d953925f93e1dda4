import math
import weakref

import numpy as np
import pandas as pd
import pytest
import torch

import models_zoo
import moescope
from captures_zoo import corpus
from moescope.analyses.topk import sweep as topk_sweep
from moescope.analyses.topk.analysis import curves
from moescope.analyses.topk.options import Setting, TopkOptions, run_of, settings_of
from moescope.analyses.topk.sweep import sweep
from moescope.corpora.packing import Packing
from moescope.errors import CaptureError, ModelError, OptionError
from moescope.evaluate.paired import compare
from moescope.evaluate.predictions import forward
from moescope.interventions import set_top_k
from moescope.models.load import load
from moescope.models.observe import observe
from moescope.reports.registry import chapter


def text():
    return corpus(documents=5)


def make_experts_equal(layer):
    with torch.no_grad():
        for expert in range(1, layer.num_experts):
            for name, tensor in layer.expert_tensors(expert).items():
                tensor.copy_(layer.expert_tensors(0)[name])


@pytest.fixture(scope="module")
def model():
    return load(models_zoo.build("qwen2_moe", num_experts_per_tok=3))


@pytest.fixture(scope="module")
def result(model):
    options = TopkOptions(bootstrap=50, one_at_a_time=True)
    return curves(model, text(), options)


def loss(result, **chosen):
    wanted = {"layers": "all", "domain": "all"} | chosen
    table = result.table
    for name, value in wanted.items():
        table = table[table[name] == value]
    assert len(table) == 1
    return table.iloc[0]


def test_all_experts_are_the_model_as_it_is(model, result):
    baseline = compare(model, text(), {}, bootstrap=50)
    for weights in ("as_is", "same_mass"):
        row = loss(result, weights=weights, k=3)
        assert row.loss == baseline.loss[0]
        assert row.difference == 0


@pytest.mark.parametrize("weights", ["as_is", "same_mass", "to_one"])
@pytest.mark.parametrize("k", [0, 1, 2, 3])
def test_losses_are_those_of_compare(model, result, weights, k):
    found = compare(
        model,
        text(),
        {"less": lambda: set_top_k(model.layers, k, weights)},
        bootstrap=50,
    )
    expected = found[found.intervention == "less"].set_index("domain")
    for domain in ("all", "long", "short"):
        row = loss(result, weights=weights, k=k, domain=domain)
        assert row.loss == pytest.approx(expected.loss[domain], rel=1e-6)
        assert row.difference == pytest.approx(expected.difference[domain], rel=1e-4, abs=1e-6)


def test_one_layer_is_restricted_at_a_time(model, result):
    layer = model.layers[1]
    found = compare(model, text(), {"less": lambda: set_top_k(layer, 1, "same_mass")}, bootstrap=50)
    row = loss(result, layers=str(layer.index), weights="same_mass", k=1)
    assert row.loss == pytest.approx(found[found.intervention == "less"].loss.iloc[0], rel=1e-6)
    assert set(result.table.layers) == {"all", "0", "1"}


def test_equal_experts_give_flat_curves_where_the_mass_is_kept(model):
    equal = load(models_zoo.build("qwen2_moe", num_experts_per_tok=3, norm_topk_prob=True))
    for layer in equal.layers:
        make_experts_equal(layer)
    table = curves(equal, text(), TopkOptions(bootstrap=50)).table
    kept = table[(table.weights != "as_is") & (table.k > 0)]
    assert kept.difference.abs().max() < 1e-5
    lost = table[(table.weights == "as_is") & (table.k == 1) & (table.domain == "all")]
    assert lost.difference.abs().item() > 1e-2


def test_settings_that_are_the_same_change_run_once(model):
    settings = settings_of(model, TopkOptions())
    assert len(settings) == 12
    runs = {run_of(model, setting) for setting in settings}
    assert len(runs) == 1 + 3 + 2 + 3  # as it is; k = 0, 1, 2; 1, 2; 1, 2, 3
    assert run_of(model, Setting(None, "to_one", 0)) == Setting(None, "as_is", 0)


def test_each_batch_is_read_once_for_all_settings(model, monkeypatch):
    read, passes = [], []
    batches = moescope.Corpus.batches

    def counted(*arguments, **named):
        for batch in batches(*arguments, **named):
            read.append(batch)
            yield batch

    monkeypatch.setattr(moescope.Corpus, "batches", counted)
    with observe(model.layers[:1], passes.append):
        sweep(model, text(), settings_of(model, TopkOptions()))
    assert len(read) == len(list(batches(text(), None)))
    assert len(passes) == 9 * len(read)


def test_nothing_outlives_its_setting(model, monkeypatch):
    made = []

    def watched(*arguments):
        assert not any(logits() is not None for logits in made)
        logits = forward(*arguments)
        made.append(weakref.ref(logits))
        return logits

    monkeypatch.setattr(topk_sweep, "forward", watched)
    sweep(model, text(), settings_of(model, TopkOptions()))
    assert len(made) == 9 * len(list(text().batches(None)))


def test_experts_that_are_left_out_are_not_computed(model, monkeypatch):
    slots = []
    settings = [Setting(None, "same_mass", k) for k in (0, 1, 2)]

    def watched(*arguments):
        seen = []
        handle = model.layers[0].block.experts.register_forward_pre_hook(
            lambda _, given: seen.append(given[1].shape[1])
        )
        logits = forward(*arguments)
        handle.remove()
        slots.append(seen)
        return logits

    monkeypatch.setattr(topk_sweep, "forward", watched)
    sweep(model, text(), settings)
    assert slots == [[3], [0], [1], [2]] * (len(slots) // 4)


def test_fewer_k_can_be_asked_for_and_all_experts_stay_in_the_table(model):
    options = TopkOptions(k=(1,), weights=("as_is",), bootstrap=50)
    result = curves(model, text(), options)
    assert sorted(set(result.table.k)) == [1, 3]
    assert list(result.tables["cost"].k) == [1, 3]
    with pytest.raises(OptionError, match="0 to 3"):
        settings_of(model, TopkOptions(k=(4,)))


def test_published_number_is_the_mean_of_the_perplexities_of_documents(model, result):
    table = result.tables["published"]
    losses = {}
    with torch.no_grad(), set_top_k(model.layers, 1):
        for batch in text().batches(None):
            logits = model.forward(batch.input_ids, batch.attention_mask, head=True).logits
            log = logits.log_softmax(-1)
            for row in range(len(batch.input_ids)):
                for p in range(1, 11):
                    here, there = batch.documents[row, p : p + 2].tolist()
                    if here == there and here >= 0:
                        key = batch.domains[row, p].item(), here
                        nll = -log[row, p, batch.input_ids[row, p + 1]].item()
                        losses.setdefault(key, []).append(nll)
    for number, domain in enumerate(("long", "short")):
        expected = np.mean([math.exp(np.mean(v)) for key, v in losses.items() if key[0] == number])
        row = table[(table.domain == domain) & (table.k == 1)].iloc[0]
        assert row.mean_perplexity == pytest.approx(expected, rel=1e-4)
        scaled = table[table.domain == domain].scaled
        assert (scaled.min(), scaled.max()) == (0, 1)
    assert sorted(set(table.k)) == [1, 2, 3]


def test_active_parameters_are_counted(model, result):
    cost = result.tables["cost"].set_index("k")
    layer = model.layers[0]
    expert = 3 * layer.hidden_size * layer.intermediate_size
    for k in (0, 1, 2):
        saved = (3 - k) * expert * len(model.layers)
        assert cost.active_parameters[3] - cost.active_parameters[k] == pytest.approx(saved)
    assert cost.ratio[3] == 1
    assert cost.loss_as_is[3] == loss(result, weights="as_is", k=3).loss


def test_layers_of_different_top_k_are_restricted_as_far_as_they_go(model):
    changed = load(models_zoo.build("qwen2_moe", num_experts_per_tok=3))
    changed.model.model.layers[1].mlp.gate.top_k = 1
    assert [layer.top_k for layer in changed.layers] == [3, 1]
    options = TopkOptions(bootstrap=50, weights=("as_is",), one_at_a_time=True)
    table = curves(changed, text(), options).table
    assert set(table[table.layers == "1"].k) == {0, 1}
    both = table[(table.domain == "all") & (table.k == 2)].set_index("layers").loss
    assert both["all"] == both["0"]


def test_findings_say_the_numbers(result):
    row = loss(result, weights="as_is", k=1)
    first = result.findings[0]
    assert f"{row.difference:+.3f}" in first.text
    assert first.numbers["difference_as_is"] == row.difference
    assert "One layer at a time" in " ".join(f.text for f in result.findings)


def test_with_one_expert_per_token_there_is_only_none():
    single = load(models_zoo.build("mixtral", num_experts_per_tok=1))
    result = curves(single, text(), TopkOptions(bootstrap=50, weights=("as_is",)))
    assert set(result.table.k) == {0, 1}
    assert "With 0 of 1 routed experts" in result.findings[0].text
    assert "MoE Lens" not in " ".join(finding.text for finding in result.findings)
    assert [f.name for f in chapter("topk").draw(result)] == ["topk-loss", "topk-cost"]


def test_figures(result):
    names = [figure.name for figure in chapter("topk").draw(result)]
    assert names == ["topk-loss", "topk-layers", "topk-cost", "topk-published"]
    for figure in chapter("topk").draw(result):
        assert figure.specification()["datasets"]
        assert figure.title.endswith("?")


@pytest.fixture(scope="module")
def reading():
    """A model that can read text."""
    tokenizer = load("tiny").tokenizer
    return load(models_zoo.build("olmoe", vocab_size=len(tokenizer)), tokenizer=tokenizer)


def test_the_corpus_of_a_capture_is_opened_again(reading, tmp_path):
    (tmp_path / "a.txt").write_text("\n\n".join(f"The year {n} was long." for n in range(60)))
    given = moescope.Corpus.from_sources(
        {"years": f"{tmp_path / 'a.txt'}:paragraphs", "code": "builtin:code"},
        Packing(length=32, rows=4, max_tokens=1_000),
    )
    moescope.capture(reading, given, tmp_path / "run", record=("routing",))
    run = moescope.Run(tmp_path / "run")
    topk = moescope.analyses.registry.find("topk")
    result = topk(run, model=reading, k=(1,), weights=("as_is",), bootstrap=50)
    expected = compare(reading, given, {}, bootstrap=50)
    rows = result.table[result.table.k == 2]
    assert list(rows.domain) == ["all", "years", "code"]
    assert list(rows.loss) == pytest.approx(list(expected.loss), rel=1e-6)
    saved = run.result("topk")
    assert saved.provenance["options"]["k"] == [1]
    pd.testing.assert_frame_equal(saved.table, result.table)
    short = topk(run, model=reading, k=(1,), weights=("as_is",), bootstrap=50, tokens=200)
    assert short.table.n_tokens[0] < 250

    (tmp_path / "a.txt").write_text("Something else.")
    with pytest.raises(CaptureError, match="text changed"):
        topk(run, model=reading)
    (tmp_path / "a.txt").unlink()
    with pytest.raises(CaptureError, match="cannot be opened again"):
        topk(run, model=reading)


def test_a_corpus_of_token_ids_cannot_be_opened_again(model, tmp_path):
    moescope.capture(model, text(), tmp_path, record=("routing",))
    with pytest.raises(CaptureError, match="cannot be opened again"):
        moescope.analyses.registry.find("topk")(tmp_path, model=model)


def test_encoder_decoder_models_are_refused(model):
    encoder_decoder = load(models_zoo.build("mixtral"))
    encoder_decoder.model.config.is_encoder_decoder = True
    with pytest.raises(ModelError, match="encoder-decoder"):
        curves(encoder_decoder, text(), TopkOptions())


def test_options_that_say_nothing_are_refused():
    with pytest.raises(OptionError, match="tokens"):
        TopkOptions(tokens=0)
    with pytest.raises(OptionError, match="treatment"):
        TopkOptions(weights=())
