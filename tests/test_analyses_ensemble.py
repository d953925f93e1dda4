import numpy as np
import pandas as pd
import pytest
import torch

import captures_zoo
import deviants_zoo
import models_zoo
import moescope
from moescope.analyses.ensemble import parts as ensemble_parts
from moescope.analyses.ensemble.analysis import EnsembleOptions, _summary, ensemble, layer_table
from moescope.analyses.ensemble.measures import MEASURES, measured, pairs_of
from moescope.analyses.ensemble.parts import Chosen, parts_of
from moescope.captures.read import Capture
from moescope.errors import CaptureError
from moescope.evaluate.predictions import evaluating
from moescope.evaluate.totals import Resampling
from moescope.models.load import load
from moescope.reports.registry import chapter
from test_analyses_topk import make_experts_equal

RECORD = {"record": ("routing", "inputs", "residual"), "tokens": 10_000, "tokens_per_expert": 0}
QUICK = Resampling(resamples=200, seed=0)


def captured(model, folder, **changes):
    corpus = captures_zoo.corpus(documents=24)
    captures_zoo.record(folder, model, corpus, **(RECORD | changes))
    return folder


@pytest.fixture(scope="module")
def model():
    return load(models_zoo.build("qwen2_moe", num_experts_per_tok=3))


@pytest.fixture(scope="module")
def run(model, tmp_path_factory):
    return captured(model, tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def result(model, run):
    return ensemble(run, model=model, bootstrap=200)


def value(table, form, compared, measure, layer=0, column="median"):
    chosen = table[
        (table.layer == layer)
        & (table.form == form)
        & (table.compared == compared)
        & (table.measure == measure)
    ]
    assert len(chosen) == 1
    return chosen.iloc[0][column]


def all_parts(folder, layer, stack="decoder"):
    capture = Capture(folder, stack=stack)
    chosen = Chosen.of(capture, layer.index, capture.num_tokens, seed=0)
    with torch.no_grad():
        found = list(parts_of(capture, layer, chosen))
    tokens = torch.cat([tokens for tokens, _ in found])
    return chosen, tokens, {n: torch.cat([p[n] for _, p in found]) for n in found[0][1]}


@pytest.mark.parametrize("family", ["qwen2_moe", "llama4_text", "granitemoeshared"])
def test_parts_add_up_to_the_output_of_the_block(family, tmp_path):
    build = deviants_zoo.DEVIANTS.get(family, lambda: models_zoo.build("qwen2_moe"))
    the_model = load(build())
    captured(the_model, tmp_path)
    corpus, outputs = captures_zoo.corpus(documents=24), []
    layer = the_model.layers[0]
    with moescope.models.observe.observe([layer], outputs.append), torch.no_grad():
        for batch in corpus.batches(None):
            the_model.forward(batch.input_ids, batch.attention_mask)
            outputs[-1] = outputs[-1].output[batch.kept.flatten()]
    _, tokens, parts = all_parts(tmp_path, layer)
    expected = torch.cat(outputs)[tokens]
    total = parts["all"]
    if layer.shared_in_block and "shared" in parts:
        total = total + parts["shared"]
    torch.testing.assert_close(total, expected, rtol=1e-4, atol=1e-4)


def test_the_largest_smallest_and_a_random_expert_are_terms_of_the_sum(model, run):
    layer = model.layers[0]
    chosen, tokens, parts = all_parts(run, layer)
    mass = chosen.weights[tokens]
    for name, best in (("top", mass.argmax(1)), ("lowest", mass.argmin(1))):
        for row in (0, 7, 20):
            slot = best[row]
            x = Capture(run).inputs(0).values[tokens[row]][None]
            expert = int(chosen.experts[tokens[row], slot])
            with torch.no_grad():
                term = mass[row, slot] * layer.expert_outputs(x, [expert])[0, 0]
            torch.testing.assert_close(parts[name][row], term, rtol=1e-4, atol=1e-5)
    random = chosen.slots["random"]
    shares = random.bincount(minlength=3) / len(random)
    assert (shares - 1 / 3).abs().max() < 4 * (2 / 9 / len(random)) ** 0.5


def by_hand():
    return {
        "residual": [3.0, 0.0],
        "input": [1.0, 0.0],
        "shared": [0.0, 1.0],
        "top": [2.0, 0.0],
        "random": [0.0, 2.0],
        "lowest": [0.0, 2.0],
        "all": [2.0, 2.0],
    }


@pytest.mark.parametrize(
    ("form", "compared", "one", "whole"),
    [
        ("routed", "top", (2, 0), (2, 2)),
        ("routed", "lowest", (0, 2), (2, 2)),
        ("block", "top", (2, 1), (2, 3)),
        ("block", "shared_only", (0, 1), (2, 3)),
        ("residual", "top", (5, 1), (5, 3)),
        ("residual", "shared_only", (3, 1), (5, 3)),
        ("residual", "residual_only", (3, 0), (5, 3)),
        ("published", "random", (1, 3), (3, 3)),
        ("published", "residual_only", (1, 0), (3, 3)),
    ],
)
def test_forms_by_hand(form, compared, one, whole):
    # A second token that is the opposite of the first: the means are zero.
    parts = {name: torch.tensor([part, [-x for x in part]]) for name, part in by_hand().items()}
    found = measured(lambda: iter([parts]))[form, compared]
    one, whole = np.array(one, float), np.array(whole, float)
    cosine = one @ whole / np.linalg.norm(one) / np.linalg.norm(whole)
    ratio = np.linalg.norm(one) / np.linalg.norm(whole)
    error = np.linalg.norm(one - whole) / np.linalg.norm(whole)
    for token in (0, 1):
        assert found[:, token].tolist() == pytest.approx([cosine, cosine, ratio, error], rel=1e-6)


def test_every_form_has_its_controls():
    parts = {name: torch.tensor([part]) for name, part in by_hand().items()}
    found = [(pair.form, pair.compared) for pair in pairs_of(parts)]
    assert len(found) == len(set(found)) == 3 + 4 + 5 + 5
    del parts["shared"]
    found = [(pair.form, pair.compared) for pair in pairs_of(parts)]
    assert len(found) == 3 + 4 + 4
    assert "block" not in {form for form, _ in found}


def test_centred_cosine_does_not_see_a_constant(model):
    generator = torch.Generator().manual_seed(0)
    shape = (200, 8)
    parts = {n: torch.randn(shape, generator=generator) for n in ("top", "random", "lowest")}
    parts["all"] = sum(parts.values())
    parts |= {"input": torch.zeros(shape), "residual": torch.zeros(shape)}
    moved = parts | {"residual": parts["residual"] + 100 * torch.eye(8)[0]}
    plain, constant = (measured(lambda p=p: iter([p])) for p in (parts, moved))
    key = ("residual", "lowest")
    assert constant[key][0].min() > 0.99
    torch.testing.assert_close(constant[key][1], plain[key][1], rtol=1e-3, atol=1e-3)
    assert constant[key][1].mean() < 0.8


def test_vectors_of_zero_have_no_cosine():
    parts = {name: torch.zeros(1, 2) for name in by_hand()}
    for values in measured(lambda: iter([parts])).values():
        assert values.isnan().all()


def test_equal_experts_have_cosine_one(tmp_path):
    equal = load(models_zoo.build("qwen2_moe", num_experts_per_tok=3))
    for layer in equal.layers:
        make_experts_equal(layer)
    captured(equal, tmp_path)
    table = ensemble(tmp_path, model=equal, bootstrap=50).table
    alike = table[(table.form == "routed") & (table.measure == "cosine")]
    assert set(alike.compared) == {"top", "random", "lowest"}
    assert alike["median"].to_numpy() == pytest.approx(1, abs=1e-5)
    assert alike["mean"].to_numpy() == pytest.approx(1, abs=1e-5)


def test_the_published_cosine_is_that_of_a_large_input_alone(tmp_path):
    planted = load(models_zoo.build("qwen2_moe", num_experts_per_tok=3))
    with torch.no_grad():
        for layer in planted.layers:
            for expert in range(layer.num_experts):
                layer.expert_tensors(expert)["down_proj"].mul_(0.05)
            layer.block.shared_expert.down_proj.weight.mul_(0.05)
    captured(planted, tmp_path)
    table = ensemble(tmp_path, model=planted, bootstrap=50).table
    for layer in (0, 1):
        assert value(table, "routed", "lowest", "cosine", layer) < 0.8
        assert value(table, "published", "lowest", "cosine", layer) > 0.95
        assert value(table, "published", "residual_only", "cosine", layer) > 0.95


def test_controls_are_worse_than_the_best_expert(result):
    for layer in (0, 1):
        errors = [value(result.table, "routed", n, "relative_error", layer) for n in
                  ("top", "random", "lowest")]  # fmt: skip
        assert errors == sorted(errors)
        shared = value(result.table, "block", "shared_only", "relative_error", layer)
        assert shared > value(result.table, "block", "top", "relative_error", layer)


def test_one_expert_per_token_is_all_there_is(tmp_path):
    single = load(models_zoo.build("mixtral", num_experts_per_tok=1))
    captured(single, tmp_path)
    table = ensemble(tmp_path, model=single, bootstrap=50).table
    assert set(table.form) == {"routed", "residual", "published"}
    top = table[table.compared == "top"].set_index("measure")["median"]
    for measure in MEASURES:
        expected = 0 if measure == "relative_error" else 1
        assert top[measure].to_numpy() == pytest.approx(expected, abs=1e-5)


def test_chunks_change_nothing(model, run, result, monkeypatch):
    monkeypatch.setattr(ensemble_parts, "_BYTES_AT_ONCE", 50 * 4 * 3 * 32)
    again = ensemble(run, model=model, bootstrap=200)
    columns = ["median", "mean", "n_tokens"]
    pd.testing.assert_frame_equal(again.table[columns], result.table[columns], rtol=1e-4)


def test_tables_say_what_they_rest_on(model, run, result):
    capture = Capture(run)
    assert (result.table.n_tokens == capture.num_tokens).all()
    assert (result.table.n_documents == len(capture.document_names)).all()
    assert (result.table.status == "ok").all()
    assert (result.table.median_low <= result.table["median"]).all()
    assert (result.table["median"] <= result.table.median_high).all()
    row = result.table.iloc[0]
    assert row["mean"] - row.mean_low == pytest.approx(row.mean_high - row["mean"])
    assert f"{value(result.table, 'routed', 'top', 'cosine', 0):.3f}" in result.findings[0].text
    saved = moescope.Run(run).result("ensemble")
    assert len(saved.table) == 2 * 17 * len(MEASURES)


def test_summary_of_tokens_by_hand():
    values = np.array([1.0, 2.0, 3.0, np.nan, 10.0])
    found = _summary(values, documents=np.array([0, 0, 4, 4, 4]), resampling=QUICK)
    assert found["median"] == 2.5
    assert found["mean"] == 4
    assert (found["n_tokens"], found["n_documents"]) == (4, 2)
    assert found["status"] == "few_documents"
    assert np.isnan([found["median_low"], found["mean_high"]]).all()


def test_interval_of_the_median_of_independent_tokens_is_the_binomial_one():
    values = np.random.default_rng(0).normal(size=400)
    found = _summary(values, documents=np.arange(400), resampling=QUICK)
    ranks = 0.5 + np.array([-1, 1]) * 1.96 * 0.5 / 20
    low, high = np.quantile(values, ranks)
    assert found["median_low"] == pytest.approx(low, abs=0.02)
    assert found["median_high"] == pytest.approx(high, abs=0.02)


def test_interval_of_the_median_of_tokens_in_documents_holds_the_truth():
    # Tokens of one document are alike: an interval over tokens would be far too narrow.
    inside = 0
    for seed in range(200):
        random = np.random.default_rng(seed)
        sizes = random.integers(5, 60, size=40)
        owners = np.repeat(np.arange(40), sizes)
        values = random.normal(size=40)[owners] + 0.3 * random.normal(size=len(owners))
        found = _summary(values, documents=owners, resampling=QUICK)
        inside += found["median_low"] <= 0 <= found["median_high"]
    assert inside >= 180


@pytest.fixture(scope="module")
def two_stacks(tmp_path_factory):
    """Experts of an encoder-decoder that have no capacity for all their tokens."""
    the_model = load(deviants_zoo.switch(expert_capacity=3))
    return the_model, captured(the_model, tmp_path_factory.mktemp("switch"))


def test_both_stacks_are_measured_and_tokens_without_expert_left_out(two_stacks):
    the_model, folder = two_stacks
    table = ensemble(folder, model=the_model, bootstrap=50).table
    assert set(table["stack"]) == {"decoder", "encoder"}
    for layer in the_model.layers:
        capture = Capture(folder, stack=layer.stack)
        used = (capture.routing(layer.index).experts >= 0).any(1).sum().item()
        rows = table[(table["stack"] == layer.stack) & (table.layer == layer.index)]
        assert 0 < used < capture.num_tokens
        assert (rows.n_tokens == used).all()


def test_slots_that_were_not_used_are_not_chosen(two_stacks):
    the_model, folder = two_stacks
    layer = the_model.layers[0]
    chosen, tokens, _ = all_parts(folder, layer, layer.stack)
    for slots in chosen.slots.values():
        assert (chosen.experts[tokens, slots[tokens]] >= 0).all()


def test_a_capture_without_what_is_needed_is_refused(model, tmp_path):
    captured(model, tmp_path / "a", record=("routing", "inputs"))
    with pytest.raises(CaptureError, match="lacks residual"):
        ensemble(tmp_path / "a", model=model)
    captured(model, tmp_path / "b", tokens=0, tokens_per_expert=5)
    with pytest.raises(CaptureError, match="no whole rows"):
        ensemble(tmp_path / "b", model=model)


def test_layers_are_measured_alone(model, run, result):
    with evaluating(model):
        table = layer_table(Capture(run), model.layers[1], EnsembleOptions(bootstrap=200))
    expected = result.table[result.table.layer == 1].reset_index(drop=True)
    pd.testing.assert_frame_equal(table, expected)


def test_figures(result):
    drawn = chapter("ensemble").draw(result)
    assert [figure.name for figure in drawn] == [
        "ensemble-cosine",
        "ensemble-centred-cosine",
        "ensemble-error",
        "ensemble-norm",
    ]
    for figure in drawn:
        assert figure.specification()["datasets"]
        assert figure.title.endswith("?")
