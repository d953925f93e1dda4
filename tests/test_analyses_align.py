import numpy as np
import pandas as pd
import pytest
import torch

import moescope
from models_zoo import build
from moescope.corpora.packing import Packing
from moescope.errors import CaptureError, OptionError


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
        "fvu_random_sd fvu_floor fvu_self score score_low score_high steps converged status seed"
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
    from moescope.analyses import align as module

    def fail(*_args, **_options):
        raise AssertionError("computed again")

    monkeypatch.setattr(module, "fit_pairs", fail)
    after = aligned(planted)
    pd.testing.assert_frame_equal(after.table, before.table)
    with pytest.raises(AssertionError, match="computed again"):
        aligned(planted, source_experts=(0, 1, 2))


def test_held_out_documents_do_not_train(planted):
    from moescope.analyses.align import AlignOptions, held_out_documents

    capture = moescope.Capture(planted[0])
    held_out = held_out_documents(capture, AlignOptions(source=0, target=1))
    assert held_out.sum() == round(0.2 * len(capture.document_names))
    table = aligned(planted).table
    assert (table.n_documents == held_out.sum().item()).all()


def test_other_libraries_mean_other_parts(planted, monkeypatch):
    from moescope.analyses import align as module

    before = aligned(planted).provenance["adapters"]
    monkeypatch.setattr(module, "library_versions", lambda: {"torch": "99"})
    assert aligned(planted, protocol="published").provenance["adapters"] != before
    after = aligned(planted, controls=False).provenance["adapters"]
    assert after != before
    monkeypatch.undo()
    assert aligned(planted).provenance["adapters"] == before


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


def test_bad_requests_are_refused(planted):
    with pytest.raises(OptionError, match="layer 0 has no expert 8.*0 to 7"):
        aligned(planted, source_experts=(8,))
    with pytest.raises(OptionError, match="protocol"):
        aligned(planted, protocol="publishd")
    folder, _ = planted
    with pytest.raises(CaptureError, match="another model"):
        moescope.align(folder, model=moescope.load(build("mixtral", seed=5)), source=0, target=1)
    with pytest.raises(CaptureError, match="in memory.*model=model"):
        moescope.align(folder, source=0, target=1)
