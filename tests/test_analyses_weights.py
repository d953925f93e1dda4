"""The analysis of weights: planted likeness is found, and nothing where there is none."""

import numpy as np
import pytest
import torch

import captures_zoo
import models_zoo
from moescope.analyses.material import Material
from moescope.analyses.registry import find
from moescope.analyses.weights.analysis import compared, weights
from moescope.analyses.weights.options import WeightsOptions
from moescope.analyses.weights.router import Association, together_table
from moescope.cli import main
from moescope.errors import CaptureError, ModelError, OptionError
from moescope.measures.dyadic import mantel
from moescope.models.discover import moe_layers
from moescope.models.load import load
from moescope.models.on_disk import in_memory, on_disk
from moescope.reports.registry import chapter
from moescope.runs import Run
from test_models_families import BUILDERS

QUICK = {"null_pairs": 3, "permutations": 999}


def saved(folder, model):
    model.save_pretrained(folder)
    return folder


def run(folder, model=None, **options):
    path = folder / "model"
    saved(path, model if model is not None else models_zoo.build("qwen2_moe"))
    return weights(folder / "run", checkpoint=str(path), **QUICK | options)


def tensors(layer, expert):
    return layer.expert_tensors(expert)


def copy_expert(source, target, order=None):
    """Write one expert over another, its neurons in another order."""
    with torch.no_grad():
        for name, tensor in source.items():
            moved = tensor
            if order is not None and name == "gate_up_proj":
                gate, up = tensor.chunk(2)
                moved = torch.cat([gate[order], up[order]])
            elif order is not None:
                moved = tensor[:, order]
            target[name].copy_(moved)


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    return run(tmp_path_factory.mktemp("plain"))


def value(table, column="mean", **where):
    for name, wanted in where.items():
        table = table[table[name] == wanted]
    assert len(table) == 1
    return table.iloc[0][column]


def test_tables_against_plain_loops(result):
    layers = moe_layers(models_zoo.build("qwen2_moe"))
    flat = [
        [layer.expert_weights(e).gate.double().flatten() for e in range(layer.num_experts)]
        for layer in layers
    ]
    cosine = torch.nn.CosineSimilarity(dim=0)
    expected = [cosine(a, b) for i, a in enumerate(flat[0]) for b in flat[0][i + 1 :]]
    found = value(result.table, layer=0, measure="cosine", matrix="gate")
    assert found == pytest.approx(float(torch.stack(expected).mean()), abs=1e-6)
    across = [cosine(a, b) for a in flat[0] for b in flat[1]]
    row = value(result.tables["layers"], "cosine_gate", layer=0, other_layer=1)
    assert row == pytest.approx(float(torch.stack(across).mean()), abs=1e-6)
    means = [layers[1].expert_weights(e).down.double().mean(1) for e in (2, 5)]
    pair = {"layer": 1, "other_layer": 1, "expert": 2, "other_expert": 5}
    found = value(result.tables["pairs"], "average_down", **pair)
    assert found == pytest.approx(float(cosine(*means)), abs=1e-6)
    rows = layers[1].router_weight[[2, 5]].double()
    assert value(result.tables["pairs"], "router", **pair) == pytest.approx(float(cosine(*rows)))


def test_random_experts_are_alike_in_nothing(result):
    assert result.table[result.table["measure"] == "cosine"]["mean"].abs().max() < 0.05
    matching = result.tables["matching"]
    matched = matching[(matching["measure"] == "matched") & (matching["apart"] == 0)]
    assert (matched["mean"] - matched["gaussian_mean"]).abs().max() < 0.02
    assert set(matching["apart"]) == {0, 1}
    assert (result.tables["router"]["p_corrected"] > 0.05).all()


def test_permuted_copies_are_matched(tmp_path):
    model = models_zoo.build("qwen2_moe")
    layer = moe_layers(model)[0]
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    for expert in range(1, 8):
        copy_expert(tensors(layer, 0), tensors(layer, expert), order if expert % 2 else None)
    table = run(tmp_path, model).tables["matching"]
    inside = {"layer": 0, "other_layer": 0}
    assert value(table, measure="matched", **inside) == pytest.approx(1, abs=1e-5)
    assert value(table, measure="in_order", **inside) < 0.6
    assert value(table, measure="matched", layer=1, other_layer=1) < 0.7


def test_upcycled_experts_are_their_ancestor(tmp_path):
    dense = models_zoo.build("qwen2_moe", mlp_only_layers=[0, 1], intermediate_size=16)
    saved(tmp_path / "dense", dense)
    model = models_zoo.build("qwen2_moe")
    for layer, old in zip(moe_layers(model), dense.model.layers, strict=True):
        for expert in range(8):
            state = old.mlp
            gate_up = torch.cat([state.gate_proj.weight, state.up_proj.weight]).detach()
            source = {"gate_up_proj": gate_up, "down_proj": state.down_proj.weight.detach()}
            copy_expert(source, tensors(layer, expert))
    result = run(tmp_path, model, ancestor=str(tmp_path / "dense"))
    ancestor = result.tables["ancestor"]
    for column in ("cosine_gate", "cosine_up", "cosine_down", "cosine_all", "matched", "tau"):
        np.testing.assert_allclose(ancestor[column], 1, atol=1e-6)
    assert (result.table[result.table["measure"] == "cosine"]["mean"] > 1 - 1e-6).all()
    assert any(finding.text.startswith("Against the ancestor") for finding in result.findings)
    assert "weights-ancestor" in [figure.name for figure in chapter("weights").draw(result)]


def test_parts_of_an_ancestor_are_found(tmp_path):
    """Neurons of a dense layer divided among experts."""
    dense = models_zoo.build("qwen2_moe", mlp_only_layers=[0, 1], intermediate_size=128)
    saved(tmp_path / "dense", dense)
    model = models_zoo.build("qwen2_moe")
    for layer, old in zip(moe_layers(model), dense.model.layers, strict=True):
        for expert in range(8):
            own = slice(expert, None, 8)
            gate, up = old.mlp.gate_proj.weight[own], old.mlp.up_proj.weight[own]
            source = {"gate_up_proj": torch.cat([gate, up]).detach()}
            source["down_proj"] = old.mlp.down_proj.weight[:, own].detach()
            copy_expert(source, tensors(layer, expert))
    ancestor = run(tmp_path, model, ancestor=str(tmp_path / "dense")).tables["ancestor"]
    assert (ancestor["matched"] > 0.99).all()
    assert (ancestor["gaussian_matched"] < 0.7).all()
    assert ancestor["cosine_all"].isna().all()


def test_other_ancestors_are_told(tmp_path):
    dense = models_zoo.build(
        "qwen2_moe", mlp_only_layers=[0], intermediate_size=16, num_hidden_layers=1, hidden_size=64
    )
    saved(tmp_path / "dense", dense)
    result = run(tmp_path, ancestor=str(tmp_path / "dense"))
    assert (
        result.tables["ancestor"]["status"].tolist() == ["other_shape"] * 8 + ["no_such_layer"] * 8
    )
    with pytest.raises(ModelError, match="no dense model"):
        run(tmp_path, ancestor="tiny")


def test_a_copied_block_shows_between_layers(tmp_path):
    model = models_zoo.build("qwen2_moe", num_hidden_layers=4)
    layers = moe_layers(model)
    for expert in range(8):
        copy_expert(tensors(layers[0], expert), tensors(layers[2], (expert + 3) % 8))
    result = run(tmp_path, model)
    table = result.tables["layers"]
    assert value(table, "best", layer=0, other_layer=2) == pytest.approx(1, abs=1e-6)
    others = table[~((table["layer"] == 0) & (table["other_layer"] == 2))]
    assert len(others) == 9
    assert others["best"].max() < 0.3
    pairs = result.tables["pairs"]
    copies = pairs[
        (pairs["layer"] == 0) & (pairs["other_layer"] == 2) & (pairs["cosine_all"] > 0.9)
    ]
    assert [(e + 3) % 8 for e in copies["expert"]] == copies["other_expert"].tolist()
    assert "(layer 0 and layer 2)" in str(result)


def test_router_rows_that_are_mean_gate_neurons_have_r_one(tmp_path):
    model = models_zoo.build("qwen2_moe")
    for layer in moe_layers(model):
        for expert in range(8):
            with torch.no_grad():
                layer.router_weight[expert] = layer.expert_weights(expert).gate.mean(0)
    result = run(tmp_path, model)
    router = result.tables["router"]
    gate = router[router["matrix"] == "gate"]
    np.testing.assert_allclose(gate["r"], 1, atol=1e-5)
    assert (gate["p_value"] == 1 / 1000).all()
    assert (router[router["matrix"] != "gate"]["p_value"] > 0.01).all()
    together = result.tables["router_together"]
    assert value(together, "mean_r", form="average", matrix="gate") == pytest.approx(1, abs=1e-5)
    assert value(together, "p_corrected", form="average", matrix="gate") <= 0.006


def test_random_router_rows_have_uniform_p():
    """Over two layers of 8 experts, 1,000 draws."""
    random = np.random.default_rng(0)
    values = []
    for draw in range(1_000):
        found = [
            mantel(
                np.corrcoef(random.normal(size=(8, 6))),
                np.corrcoef(random.normal(size=(8, 6))),
                permutations=99,
                seed=[draw, layer],
            )
            for layer in range(2)
        ]
        every = [Association(None, "average", "gate", one) for one in found]
        values.append(together_table(every)["p_value"].iloc[0])
    assert np.mean(np.array(values) <= 0.05) == pytest.approx(0.05, abs=0.02)
    assert np.mean(values) == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize(
    "family", ["gpt_oss", "longcat_flash", "nemotron_h", "switch_transformers"]
)
def test_families_of_other_forms(family, tmp_path):
    model = BUILDERS[family]()
    result = run(tmp_path, model)
    layers = moe_layers(model)
    assert len(result.tables["layers"]) == len(layers) * (len(layers) + 1) // 2
    matrices = set(result.table["matrix"])
    assert matrices == ({"gate"} if family in ("gpt_oss", "longcat_flash") else set()) | {
        "up",
        "down",
        "all",
    }
    if family == "longcat_flash":  # the last 3 of 8 experts are the identity
        assert set(result.table["n_experts"]) == {5}
    if family == "switch_transformers":
        assert set(result.table["stack"]) == {"encoder", "decoder"}
    assert len(chapter("weights").draw(result)) == 5


def test_layers_of_other_shapes_are_not_compared(tmp_path):
    """The second layer has narrower experts."""
    stored = on_disk(saved(tmp_path / "a", models_zoo.build("qwen2_moe")))
    other = on_disk(saved(tmp_path / "b", models_zoo.build("qwen2_moe", moe_intermediate_size=12)))
    mixed = type(stored)(
        layers=[stored.layers[0], other.layers[1]],
        reading=lambda la: (stored if la is stored.layers[0] else other).reading(la),
        name="mixed",
        revision=None,
        fingerprint="",
    )
    result = compared(mixed, WeightsOptions(**QUICK))
    table = result.tables["layers"]
    assert value(table, "status", layer=0, other_layer=1) == "other_shape"
    assert np.isnan(value(table, "best", layer=0, other_layer=1))
    matching = result.tables["matching"]
    across = matching[matching["apart"] == 1].set_index("measure")
    assert np.isnan(across.loc["in_order", "mean"])
    assert across.loc["matched", "n_pairs"] == 28
    assert len(chapter("weights").draw(result)) == 5


def test_one_expert_per_layer_has_no_pairs(tmp_path):
    dense = models_zoo.build("qwen2_moe", mlp_only_layers=[0, 1])
    model = load(dense, dense_as_experts=True)
    result = compared(in_memory(model), WeightsOptions(**QUICK))
    assert set(result.table["status"]) == {"one_expert"}
    assert value(result.tables["layers"], "n_pairs", layer=0, other_layer=1) == 1
    chapter("weights").draw(result)


def test_reach_and_cells_bound_what_is_kept(tmp_path):
    model = models_zoo.build("qwen2_moe", num_hidden_layers=4)
    result = run(tmp_path, model, reach=1, cells=100, matched=5, matched_across=0)
    assert len(result.tables["layers"]) == 4 + 3
    pairs = result.tables["pairs"]
    assert (pairs["layer"] == pairs["other_layer"]).all()
    assert set(result.tables["matching"]["n_pairs"]) == {5}
    chapter("weights").draw(result)


def test_a_run_needs_no_capture(tmp_path, capsys):
    path = saved(tmp_path / "model", models_zoo.build("olmoe"))
    quick = ["--permutations", "99", "--null-pairs", "2"]
    assert main(["weights", str(tmp_path / "run"), "--checkpoint", str(path), *quick]) == 0
    provenance = Run(tmp_path / "run").result("weights").provenance
    assert provenance["model"] == str(path)
    assert provenance["weights_fingerprint"] == on_disk(path).fingerprint
    assert "capture" not in provenance
    assert main(["report", str(tmp_path / "run")]) == 0
    assert main(["weights", str(tmp_path / "other")]) == 1
    assert "--checkpoint" in capsys.readouterr().err


def test_the_captured_model_is_read_if_no_other_is_named(tmp_path):
    path = saved(tmp_path / "model", models_zoo.build("qwen2_moe"))
    captures_zoo.record(tmp_path / "run", load(path))
    found = weights(tmp_path / "run", **QUICK)
    named = weights(tmp_path / "other", checkpoint=str(path), **QUICK)
    assert found.table.equals(named.table)
    assert found.provenance["model"] == str(path)


def test_a_model_in_memory_is_passed(tmp_path):
    model = load(models_zoo.build("qwen2_moe"))
    captures_zoo.record(tmp_path / "run", model)
    with pytest.raises(CaptureError, match="model in memory"):
        weights(tmp_path / "run", **QUICK)
    found = weights(tmp_path / "run", model=model, **QUICK)
    assert found.table.equals(compared(in_memory(model), WeightsOptions(**QUICK)).table)


def test_what_is_done_is_known(tmp_path):
    path = saved(tmp_path / "model", models_zoo.build("olmoe"))
    options = WeightsOptions(checkpoint=str(path), **QUICK)
    entry = find("weights")
    entry.run(Material(tmp_path / "run"), options)
    assert entry.is_done(Material(tmp_path / "run"), options)
    saved(path, models_zoo.build("olmoe", seed=1))
    assert not entry.is_done(Material(tmp_path / "run"), options)


@pytest.mark.parametrize(
    "options", [{"reach": 0}, {"null_pairs": 0}, {"cells": -1}, {"revision": "main"}]
)
def test_unfit_options_are_refused(options):
    with pytest.raises(OptionError):
        WeightsOptions(**options)


def test_curves_and_figures(result):
    measures = [curve.read(result) for curve in find("weights").curves]
    assert [len(frame) for frame in measures] == [2, 2, 2, 2]
    names = [figure.name for figure in chapter("weights").draw(result)]
    assert names == [
        "weights-depth",
        "weights-experts",
        "weights-layers",
        "weights-matching",
        "weights-router",
    ]
    for figure in chapter("weights").draw(result):
        figure.specification()
