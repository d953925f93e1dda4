from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

import moescope
from models_zoo import build
from moescope.alignment.options import SolverOptions
from moescope.alignment.pairs import fit_pairs
from moescope.analyses.align import work as align_work
from moescope.analyses.align.options import AlignOptions
from moescope.analyses.align.tokens import held_out_documents
from moescope.analyses.registry import find
from moescope.config import build as build_options
from moescope.corpora.packing import Packing
from moescope.errors import CaptureError, OptionError


@pytest.fixture(scope="module", autouse=True)
def few_steps():
    """What is proved here shows after 150 steps as after 300."""
    asked = AlignOptions.fit_options

    def fewer(options, budget_seconds):
        return replace(asked(options, budget_seconds), solver=SolverOptions(steps=150))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AlignOptions, "fit_options", fewer)
        yield


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """A capture of a model whose layer 1 repeats layer 0: expert e + 1 is expert e, rotated.

    f_{1,e+1}(x) = f_{0,e}(R_e x) with a hidden rotation R_e that keeps the mean of a vector, which
    LayerNorm removes.
    """
    model = build("mixtral", intermediate_size=64)
    hidden, experts = model.config.hidden_size, model.config.num_local_experts
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        first, second = (layer.mlp.experts for layer in model.model.layers)
        # Inputs without a mean, so that LayerNorm can emit them exactly.
        centre = torch.eye(hidden) - 1 / hidden
        for expert in range(experts):
            basis = torch.linalg.svd(centre).U[:, :-1]  # vectors of mean zero
            turn = torch.linalg.qr(torch.randn(hidden - 1, hidden - 1, generator=random)).Q
            rotation = basis @ turn @ basis.T
            gate_up = first.gate_up_proj[expert] @ centre
            first.gate_up_proj[expert] = gate_up
            second.gate_up_proj[(expert + 1) % experts] = gate_up @ rotation
            second.down_proj[(expert + 1) % experts] = first.down_proj[expert]
    loaded = moescope.load(model)
    ids = np.random.default_rng(0).integers(3, 97, size=(220, 40))
    corpus = moescope.Corpus.from_token_ids({"a": ids.tolist()}, Packing(length=40, packed=False))
    folder = tmp_path_factory.mktemp("planted")
    moescope.capture(loaded, corpus, folder)
    return folder, loaded


def aligned(planted, **options) -> moescope.Result:
    folder, model = planted
    chosen = {"source": 0, "target": 1, "source_experts": (0, 1), "target_experts": (0, 1, 2)}
    return moescope.align(folder, model=model, **(chosen | options))


def test_the_planted_relation_is_found_and_no_other(planted):
    table = aligned(planted).table.set_index(["source_expert", "target_expert"])
    assert (table.status == "ok").all()
    for source in (0, 1):
        scores = table.loc[source].score
        assert scores.idxmax() == source + 1
        assert table.loc[(source, source + 1), "score_low"] > 0.5
        assert (
            table.loc[(source, source + 1), "fvu"]
            < 0.5 * table.loc[source].fvu.drop(source + 1).min()
        )


def test_every_promised_column_is_there_and_saved(planted):
    result = aligned(planted)
    promised = (
        "source_layer source_expert target_layer target_expert n_train n_val mse_mean mse_sum fvu "
        "fvu_low fvu_high cosine token_error fvu_constant fvu_identity fvu_linear fvu_random "
        "fvu_random_sd fvu_floor fvu_self score score_low score_high steps converged status seed "
        "form rank adapter_parameters expert_parameters parameters_share kl_before kl_after "
        "mmd_before mmd_after"
    ).split()
    assert set(promised) <= set(result.table.columns)
    folder, _ = planted
    saved = pd.read_parquet(folder / "results" / "align.parquet")
    pd.testing.assert_frame_equal(saved, result.table)
    hidden = 32
    np.testing.assert_allclose(saved.mse_sum, hidden * saved.mse_mean, rtol=1e-6)


def test_adapters_are_saved_and_reproduce_the_error(planted):
    folder, model = planted
    result = aligned(planted)
    capture = moescope.Capture(folder)
    row = result.table.query("source_expert == 0 and target_expert == 1").iloc[0]
    path = folder / result.provenance["adapters"] / "L0E0-to-L1E1.safetensors"
    adapter = moescope.Adapter.load(path)
    x = capture.expert_inputs(0, 0).values
    wanted = model.layer(0).expert_weights(0)(x)
    given = model.layer(1).expert_weights(1)(adapter(x))
    everywhere = (given - wanted).square().mean() / wanted.var(0).mean()
    assert everywhere.item() == pytest.approx(row.fvu, abs=0.1)


def test_finished_source_experts_are_not_computed_again(planted, monkeypatch):
    before = aligned(planted)

    def fail(*_args, **_options):
        raise AssertionError("computed again")

    monkeypatch.setattr(align_work, "fit_pairs", fail)
    after = aligned(planted)
    pd.testing.assert_frame_equal(after.table, before.table)
    with pytest.raises(AssertionError, match="computed again"):
        aligned(planted, source_experts=(0, 1, 2))


def test_held_out_documents_do_not_train(planted):
    capture = moescope.Capture(planted[0])
    held_out = held_out_documents(capture, 0.2, seed=0)
    assert held_out.sum() == round(0.2 * len(capture.document_names))
    table = aligned(planted).table
    assert (table.n_documents == held_out.sum().item()).all()


def test_other_libraries_mean_other_parts(planted, monkeypatch):
    from moescope import runs as module

    one = {"source_experts": (0,), "target_experts": (0,)}
    before = aligned(planted, **one).provenance["adapters"]
    monkeypatch.setattr(module, "library_versions", lambda: {"torch": "99"})
    assert aligned(planted, **one).provenance["adapters"] != before
    monkeypatch.undo()
    assert aligned(planted, **one, controls=False).provenance["adapters"] != before
    assert aligned(planted, **one).provenance["adapters"] == before


def test_an_expert_that_gets_no_tokens_is_a_status(tmp_path):
    model = build("mixtral")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight[0] = 0
            layer.mlp.gate.weight[1:] = layer.mlp.gate.weight[1:].abs()
        model.model.embed_tokens.weight.abs_()
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.experts.down_proj.abs_().mul_(1e-3)
    loaded = moescope.load(model)
    ids = np.random.default_rng(0).integers(3, 97, size=(60, 40)).tolist()
    corpus = moescope.Corpus.from_token_ids({"a": ids, "b": ids[:1]}, Packing(length=40))
    moescope.capture(loaded, corpus, tmp_path)
    assert len(moescope.Capture(tmp_path).tokens_of(0, 0)) == 0
    result = moescope.align(
        tmp_path,
        model=loaded,
        source=0,
        target=1,
        source_experts=(0,),
        target_experts=(0, 0, 1),
        protocol="published",
        controls=False,
    )
    assert result.table.target_expert.tolist() == [0, 1]
    assert (result.table.status == "too_few_tokens").all()
    assert "too_few_tokens" in result.findings[0].text
    assert "nothing about b" in result.findings[-1].text


QUICK = {"protocol": "published", "controls": False, "target_experts": (0, 1)}


def test_several_pairs_of_layers_in_one_call(planted):
    both = aligned(planted, source=(0, 1), target=(1, 0), **QUICK)
    for name in ("align", "layers"):
        pairs = both.tables[name][["source_layer", "target_layer"]].drop_duplicates()
        assert [tuple(pair) for pair in pairs.to_numpy()] == [(0, 1), (1, 0)]
    assert len(both.table) == 2 * 2 * 2
    assert sorted(set(both.tables["distributions"].panel)) == [
        "expert outputs of layer 0",
        "expert outputs of layer 1",
        "input of layer 0",
        "input of layer 1",
    ]
    assert "2 pairs of layers" in both.findings[0].text
    alone = aligned(planted, source=1, target=0, **QUICK).table
    same = both.table[both.table.source_layer == 1].reset_index(drop=True)
    pd.testing.assert_frame_equal(alone, same)


def test_a_finished_pair_of_layers_is_not_computed_again(planted, monkeypatch):
    folder, _ = planted
    before = aligned(planted, source=0, target=1, seed=3, **QUICK)
    fitted = []

    def watched(*arguments, **options):
        fitted.append(options["source_name"])
        return fit_pairs(*arguments, **options)

    monkeypatch.setattr(align_work, "fit_pairs", watched)
    after = aligned(planted, source=(1, 0), target=(0, 1), seed=3, **QUICK)
    assert fitted == ["L1E0", "L1E1"]
    kept = after.table[after.table.source_layer == 0].reset_index(drop=True)
    pd.testing.assert_frame_equal(kept, before.table)
    assert not [path for path in (folder / after.provenance["adapters"]).iterdir() if path.is_dir()]


def test_an_interrupted_source_expert_goes_on_after_its_finished_fits(planted, monkeypatch):
    whole = aligned(planted, seed=4, source_experts=(0,))
    folder = planted[0] / whole.provenance["adapters"]
    finished = folder / "L0E0-to-L1.align.parquet"
    finished.unlink()
    unfinished = folder / "L0E0-to-L1"

    def cut_off(*arguments, outcomes, **options):
        fit_pairs(*arguments, outcomes=outcomes, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(align_work, "fit_pairs", cut_off)
    with pytest.raises(KeyboardInterrupt):
        aligned(planted, seed=4, source_experts=(0,))
    assert len(list(unfinished.glob("*.json"))) == 3 + 3 * 5 + 5 + 1

    monkeypatch.undo()
    again = aligned(planted, seed=4, source_experts=(0,))
    pd.testing.assert_frame_equal(again.table, whole.table)
    assert not unfinished.exists()


def test_left_out_layers_are_every_layer_with_the_next(planted):
    options = {"source_experts": (0,), "source": (), "target": ()}
    table = aligned(planted, **options, **QUICK).table
    assert set(zip(table.source_layer, table.target_layer, strict=True)) == {(0, 1)}


def test_matched_sources_train_on_as_many_tokens(planted):
    chosen = {"source": (0, 1), "target": (1, 0), "source_experts": (0, 1, 2)}
    free = aligned(planted, **chosen, **QUICK).table
    result = aligned(planted, **chosen, matched=True, **QUICK)
    assert free.n_train.max() > free.n_train.min()
    assert (result.table.n_train == free.n_train.min()).all()
    assert result.table.n_val.tolist() == free.n_val.tolist()
    assert result.provenance["matched_training_tokens"] == free.n_train.min()


def test_form_and_regulariser_reach_the_fits(planted, monkeypatch):
    asked = []

    def watched(*arguments, **options):
        asked.append(options["options"])
        return fit_pairs(*arguments, **options)

    monkeypatch.setattr(align_work, "fit_pairs", watched)
    chosen = {"form": "low_rank", "rank": 3, "regulariser": "mmd", "regulariser_weight": 0.25}
    result = aligned(planted, source_experts=(0,), target_experts=(0,), controls=False, **chosen)
    (options,) = asked
    assert {name: getattr(options, name) for name in chosen} == chosen
    row = result.table.iloc[0]
    assert (row.form, row["rank"]) == ("low_rank", 3)
    assert row.parameters_share == row.adapter_parameters / row.expert_parameters
    adapter = moescope.Adapter.load(
        planted[0] / result.provenance["adapters"] / "L0E0-to-L1E0.safetensors"
    )
    assert adapter.num_parameters == row.adapter_parameters


@pytest.fixture(scope="module")
def with_curves(planted):
    chosen = {"source_experts": (0,), "target_experts": (1, 2), "max_tokens": 1_200}
    without = aligned(planted, **chosen)
    return without, aligned(planted, **chosen, learning_curve=True, capacity=True)


def test_curves_leave_the_pairs_as_they_are(with_curves):
    without, result = with_curves
    pd.testing.assert_frame_equal(result.table, without.table)
    assert not {"learning", "capacity"} & set(without.tables)


def test_learning_curve_ends_with_the_pairs_themselves(with_curves):
    _, result = with_curves
    learning = result.tables["learning"]
    assert list(learning.columns) == list(result.table.columns)
    for target in (1, 2):
        curve = learning[learning.target_expert == target]
        whole = curve.n_train.max()
        shares = np.sort(curve.n_train) / whole
        np.testing.assert_allclose(shares, [1 / 8, 1 / 4, 1 / 2, 1], atol=0.03)
        row = result.table.set_index("target_expert").loc[target]
        assert curve[curve.n_train == whole].fvu.item() == row.fvu
        assert (curve.n_val == row.n_val).all()
    assert any("training tokens the held-out FVU goes from" in f.text for f in result.findings)


def test_capacity_curve_favours_the_planted_expert(with_curves):
    capacity = with_curves[1].tables["capacity"]
    by_target = capacity.groupby("target_expert")
    advantage = by_target.advantage.first()
    assert advantage[1] > 0.1
    assert advantage[1] > advantage[2] + 0.1
    assert by_target.parameters_saved.first()[1] > 1
    assert set(capacity.kind) == {"real", "random"}
    assert capacity.seed.nunique() == 5
    expert = 3 * 64 * 32
    np.testing.assert_allclose(capacity.parameters_share, capacity.adapter_parameters / expert)
    (finding,) = [f for f in with_curves[1].findings if "equal size" in f.text]
    assert finding.numbers["pairs"] == 2


def test_estimated_work_adds_up(planted):
    _, model = planted
    work = find("align").work

    def of(**options):
        return work(model, build_options(AlignOptions, options, "align"))

    one, other = of(source=0, target=1), of(source=1, target=0)
    assert of(source=(0, 1), target=(1, 0)) == one + other
    assert of() == one
    # Eight targets with five random experts each, five more and the source itself: 54 fits; a
    # capacity curve has five low ranks and the full matrix, each for the target, five random
    # experts and the source itself.
    low, full = (
        (of(source=0, target=1, form=form) - of(source=0, target=1, form="identity")) / 54
        for form in ("low_rank", "layer_norm")
    )
    with_capacity = of(source=0, target=1, capacity=True)
    assert with_capacity - one == pytest.approx(8 * 7 * (5 * low + full))
    assert of(source=0, target=1, learning_curve=True) == pytest.approx(4 * one)
    assert of(source=0, target=1, form="scale") < one


def test_bad_requests_are_refused(planted):
    with pytest.raises(OptionError, match="layer 0 has no expert 8.*0 to 7"):
        aligned(planted, source_experts=(8,))
    with pytest.raises(OptionError, match="protocol"):
        aligned(planted, protocol="publishd")
    with pytest.raises(OptionError, match="form"):
        aligned(planted, form="layer_nrm")
    with pytest.raises(OptionError, match="pairs of layers.*2 and 1 layers"):
        aligned(planted, source=(0, 1))
    with pytest.raises(OptionError, match="layer 2"):
        aligned(planted, source=(0, 1), target=(1, 2))
    folder, _ = planted
    with pytest.raises(CaptureError, match="another model"):
        moescope.align(folder, model=moescope.load(build("mixtral", seed=5)), source=0, target=1)
    with pytest.raises(CaptureError, match="in memory.*model=model"):
        moescope.align(folder, source=0, target=1)
