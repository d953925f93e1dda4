import numpy as np
import pandas as pd
import pytest
import torch
import transformers

import captures_zoo
import deviants_zoo
import models_zoo
import moescope
from moescope.analyses.outputs import one_pass as outputs_pass
from moescope.analyses.outputs.analysis import of_layer, outputs
from moescope.analyses.outputs.one_pass import Recorded, _measured
from moescope.analyses.outputs.options import OutputsOptions, operations
from moescope.analyses.outputs.tables import CONTRAST, mean_over_tokens, partial_over_tokens
from moescope.captures.read import Capture
from moescope.errors import CaptureError, ModelError
from moescope.evaluate.predictions import evaluating
from moescope.evaluate.totals import Resampling
from moescope.measures.outputs import KINDS, rank_correlations
from moescope.models.load import load
from moescope.models.on_disk import in_memory
from moescope.reports.registry import chapter
from test_analyses_topk import make_experts_equal

RECORD = {"record": ("routing", "inputs"), "tokens": 10_000, "tokens_per_expert": 0}
SMALL = {
    "vocab_size": models_zoo.VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
QUICK = Resampling(resamples=200, seed=0)


def captured(model, folder, **changes):
    corpus = captures_zoo.corpus(documents=24, skip_first=False)
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
    return outputs(run, model=model, bootstrap=200)


def rows(table, **wanted):
    for column, value in wanted.items():
        table = table[table[column] == value]
    return table


def cosine(table, pairs="all", **wanted):
    return rows(table, **({"measure": "cosine", "pairs": pairs, "tokens": "all"} | wanted))["value"]


def by_hand(model, run, layer=0):
    """Outputs [experts, tokens, hidden] of all tokens, at once."""
    with torch.no_grad():
        x = Capture(run).inputs(layer).values
        return model.layers[layer].expert_outputs(x, range(8)).double()


def test_pairs_are_means_over_tokens_by_hand(model, run, result):
    found = by_hand(model, run)
    first = Recorded.of(Capture(run), 0).first
    means = found[:, ~first].mean(1, keepdim=True)
    table = rows(result.tables["pairs"], layer=0)
    assert len(table) == 28
    for _, row in table.iterrows():
        one, other = int(row.expert), int(row.other_expert)
        values = torch.cosine_similarity(found[one], found[other], dim=1)
        centred = torch.cosine_similarity(found[one] - means[one], found[other] - means[other], 1)
        assert row.cosine == pytest.approx(values.mean().item(), abs=1e-6)
        assert row.later_cosine == pytest.approx(values[~first].mean().item(), abs=1e-6)
        assert row.centred_cosine == pytest.approx(centred.mean().item(), abs=1e-6)
        angles = 1 - values.acos() / torch.pi
        assert row.angular == pytest.approx(angles.mean().item(), abs=1e-6)


def test_kinds_of_pairs_by_hand(model, run, result):
    found = by_hand(model, run)
    experts = Capture(run).routing(0).experts
    used, rest = [], []
    for token in range(found.shape[1]):
        values = torch.cosine_similarity(found[:, None, token], found[None, :, token], dim=2)
        chosen = sorted(experts[token].tolist())
        others = [e for e in range(8) if e not in chosen]
        for kept, sample in ((chosen, used), (others, rest)):
            sample.append(values[kept][:, kept][np.triu_indices(len(kept), k=1)].mean().item())
    table = rows(result.table, layer=0)
    assert cosine(table, "both_chosen").item() == pytest.approx(np.mean(used), abs=1e-6)
    assert cosine(table, "none_chosen").item() == pytest.approx(np.mean(rest), abs=1e-6)
    contrast = np.mean(used) - np.mean(rest)
    assert cosine(table, CONTRAST).item() == pytest.approx(contrast, abs=1e-6)


def test_norms_and_scores_by_hand(model, run, result):
    norms = by_hand(model, run).norm(dim=2).T.numpy()
    routing = Capture(run).routing(0)
    scores = routing.logits.numpy()
    table = rows(result.tables["norms"], layer=0, tokens="all").set_index("measure")
    assert table.value["spearman"] == pytest.approx(rank_correlations(scores, norms).mean())
    longest = torch.from_numpy(norms.argmax(1))
    hits = (routing.experts == longest[:, None]).any(1).float().mean().item()
    assert table.value["hit_rate"] == pytest.approx(hits)
    assert table.chance["hit_rate"] == pytest.approx(3 / 8)
    experts = rows(result.tables["experts"], layer=0, tokens="all")
    assert experts.mean_norm.to_numpy() == pytest.approx(norms.mean(0), rel=1e-5)
    assert experts.longest.sum() == pytest.approx(1)
    assert experts.chosen.sum() == pytest.approx(3)
    assert (experts.mean_norm_low < experts.mean_norm).all()
    ranks = rows(result.tables["ranks"], layer=0)
    assert ranks["count"].sum() == 8 * len(norms)


def test_first_positions_are_those_of_rows_and_documents(run, result):
    capture = Capture(run)
    recorded = Recorded.of(capture, 0)
    seen = set()
    for token in range(capture.num_tokens):
        place = (int(capture.rows[token]), int(capture.documents[token]))
        assert bool(recorded.first[token]) == (place not in seen)
        seen.add(place)
    numbers = rows(result.table, layer=0, pairs="all", measure="cosine").set_index("tokens")
    assert numbers.n_tokens["first"] == len(seen)
    assert numbers.n_tokens["later"] == capture.num_tokens - len(seen) > 0


def test_equal_experts_have_cosine_one(tmp_path):
    equal = load(models_zoo.build("qwen2_moe", num_experts_per_tok=3))
    for layer in equal.layers:
        make_experts_equal(layer)
    captured(equal, tmp_path)
    found = outputs(tmp_path, model=equal, bootstrap=50)
    rest = found.table[found.table.pairs != CONTRAST]
    assert rest.value.to_numpy() == pytest.approx(1, abs=1e-3)
    norms = rows(found.tables["norms"], tokens="all").set_index(["layer", "measure"])
    assert np.isnan(norms.value[0, "spearman"])
    assert norms.status[0, "spearman"] == norms.status[0, "partial"] == "undefined"
    assert norms.value[0, "hit_rate"] == pytest.approx(3 / 8)  # all are the longest
    assert (found.tables["weights"]["status"] == "undefined").all()
    assert "equally alike" in found.findings[5].text
    assert len(chapter("outputs").draw(found)) == 4


def test_experts_that_are_negatives_are_opposite(tmp_path):
    opposite = load(models_zoo.build("mixtral"))
    with torch.no_grad():
        for layer in opposite.layers:
            make_experts_equal(layer)
            for expert in range(1, layer.num_experts, 2):
                layer.expert_tensors(expert)["down_proj"].neg_()
    captured(opposite, tmp_path)
    pairs = outputs(tmp_path, model=opposite, bootstrap=50).tables["pairs"]
    alike = (pairs.expert + pairs.other_expert) % 2 == 0
    expected = np.where(alike, 1, -1)
    assert pairs.cosine.to_numpy() == pytest.approx(expected, abs=1e-5)
    assert pairs.centred_cosine.to_numpy() == pytest.approx(expected, abs=1e-5)
    assert pairs.angular.to_numpy() == pytest.approx(np.where(alike, 1, 0), abs=1e-3)


def planted(outputs):
    """What is kept of outputs [experts, tokens, hidden], of which the first is a first position."""
    number, tokens, _ = outputs.shape
    recorded = Recorded(
        scores=torch.zeros(tokens, number),
        chosen=torch.zeros(tokens, number, dtype=torch.bool),
        documents=torch.zeros(tokens, dtype=torch.int64),
        first=torch.arange(tokens) == 0,
    )
    return _measured(lambda: iter([(torch.arange(tokens), outputs)]), recorded)


def test_what_experts_always_output_is_not_in_the_centred_cosine():
    outputs = torch.randn((4, 400, 16), generator=torch.Generator().manual_seed(0))
    own = planted(outputs).pairs["later"]
    found = planted(outputs + 50 * torch.eye(16)[0]).pairs["later"]
    assert found[0][0, 1] > 0.99
    torch.testing.assert_close(found[1], own[1], atol=1e-3, rtol=0)
    assert abs(own[1][0, 1]) < 0.05


def test_a_first_position_of_great_length_is_not_the_mean():
    outputs = torch.randn((4, 400, 16), generator=torch.Generator().manual_seed(0))
    own = planted(outputs).pairs["later"]
    outputs[:, 0] = 10_000 * torch.eye(16)[0]
    found = planted(outputs).pairs
    torch.testing.assert_close(found["later"], own, atol=1e-6, rtol=0)
    assert found["all"][0][0, 1] == pytest.approx((399 * own[0][0, 1] + 1) / 400)


def test_norms_that_follow_the_scores(tmp_path):
    # One expert's output twice as long as another's, for tokens that prefer it: all experts are
    # equal, and the router's rows make the order of scores the same for all tokens.
    model = load(models_zoo.build("mixtral"))
    with torch.no_grad():
        for layer in model.layers:
            make_experts_equal(layer)
            for expert in range(layer.num_experts):
                layer.expert_tensors(expert)["down_proj"].mul_(1.0 + expert)
            direction = layer.router_weight[0].clone()
            for expert in range(layer.num_experts):
                layer.router_weight[expert] = direction * expert
    captured(model, tmp_path)
    found = outputs(tmp_path, model=model, bootstrap=50)
    norms = rows(found.tables["norms"], tokens="all", layer=0).set_index("measure")
    # Where the direction says yes, scores rise with the norms; elsewhere they fall with them.
    logits = Capture(tmp_path).routing(0).logits
    up = (logits[:, 7] > 0).double().mean().item()
    assert 0 < up < 1
    assert norms.value["spearman"] == pytest.approx(2 * up - 1)
    assert norms.value["hit_rate"] == pytest.approx(up)
    assert norms.status["partial"] == "undefined"  # an expert is always as long


def test_chunks_change_nothing(model, run, result, monkeypatch):
    monkeypatch.setattr(outputs_pass, "_BYTES_AT_ONCE", 50 * 4 * 8 * 32)
    again = outputs(run, model=model, bootstrap=200)
    for name in ("outputs", "norms", "pairs", "experts", "ranks"):
        pd.testing.assert_frame_equal(again.tables[name], result.tables[name], rtol=1e-3, atol=1e-6)


def test_only_some_outputs_are_in_memory_at_a_time(model, run, monkeypatch):
    monkeypatch.setattr(outputs_pass, "_BYTES_AT_ONCE", 20 * 4 * 8 * 32)
    layer, seen = model.layers[0], []
    own = layer.expert_outputs
    monkeypatch.setattr(
        layer, "expert_outputs", lambda x, experts: seen.append(len(x)) or own(x, experts)
    )
    with evaluating(model):
        of_layer(Capture(run), layer, in_memory(model), OutputsOptions(bootstrap=10))
    assert max(seen) == 20
    assert sum(seen) == 2 * Capture(run).num_tokens


def test_tables_say_what_they_rest_on(run, result):
    capture = Capture(run)
    everything = rows(result.table, tokens="all")
    assert (everything.n_tokens == capture.num_tokens).all()
    assert (everything.n_documents == len(capture.document_names)).all()
    assert (everything.status == "ok").all()
    assert (everything.value_low < everything.value).all()
    assert (everything.value < everything.value_high).all()
    assert len(result.table) == 2 * 3 * 3 * (len(KINDS) + 1)
    angular = rows(result.table, layer=0, pairs="all", measure="angular", tokens="all")
    assert f"{angular.value.item():.3f}" in result.findings[0].text
    assert "by 95% intervals" in result.findings[3].text
    saved = moescope.Run(run).result("outputs")
    assert len(saved.tables["pairs"]) == 2 * 28


def test_curves_have_one_value_per_layer(result):
    for curve in outputs.curves:
        read = curve.read(result)
        assert read["layer"].tolist() == [0, 1]
        assert (read["low"] < read["value"]).all()


def noised_copies(model, steps):
    """Experts that begin as copies of the first, each with noise of so many times its weights."""
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in model.layers:
            make_experts_equal(layer)
            for expert, step in zip(range(layer.num_experts), steps, strict=True):
                for tensor in layer.expert_tensors(expert).values():
                    noise = torch.randn(tensor.shape, generator=random)
                    tensor.add_(step * tensor.std() * noise)
    return model


def test_copies_with_more_and_more_noise_agree_in_weights_and_outputs(tmp_path):
    model = noised_copies(load(models_zoo.build("mixtral")), np.linspace(0.05, 1.5, 8))
    captured(model, tmp_path)
    found = outputs(tmp_path, model=model, bootstrap=20)
    by_layers = found.tables["weights"].set_index(["layer", "weights", "outputs"])
    assert len(by_layers) == 2 * 4 * 2
    for layer in (0, 1):
        for measure in ("cosine", "matched", "cka"):
            row = by_layers.loc[layer, measure, "cosine"]
            assert row["value"] > 0.9
            assert row["p_corrected"] <= 0.05
            assert row["value_low"] < row["value"] < row["value_high"] < 1
            assert row["n_pairs"] == 28
    whole = found.tables["weights_together"].set_index(["weights", "outputs"])
    assert whole["p_value"]["cosine", "cosine"] == 1 / 10_000
    assert (whole["n_layers"] == 2).all()
    assert "Do experts with similar weights" in found.findings[5].text
    pairs = rows(found.tables["pairs"], layer=0)
    own = by_layers["value"][0, "matched", "cosine"]
    assert pairs["weights_matched"].corr(pairs["later_cosine"], "spearman") == pytest.approx(own)


def test_weights_compared_are_those_of_the_analysis_weights(model, run, result):
    theirs = moescope.weights(run, model=model, permutations=9).tables["pairs"]
    theirs = theirs[theirs.layer == theirs.other_layer].set_index(
        ["layer", "expert", "other_expert"]
    )
    ours = result.tables["pairs"].set_index(["layer", "expert", "other_expert"])
    for measure in ("cosine", "average"):
        expected = theirs[f"{measure}_all"][ours.index]
        np.testing.assert_allclose(ours[f"weights_{measure}"], expected, atol=1e-7)


def test_some_experts_are_matched(model, run):
    found = outputs(run, model=model, bootstrap=20, matched=5, permutations=99)
    table = rows(found.tables["weights"], layer=1, outputs="cosine").set_index("weights")
    assert table["n_pairs"].to_dict() == {"cosine": 28, "average": 28, "matched": 10, "cka": 10}
    assert rows(found.tables["pairs"], layer=1)["weights_matched"].notna().sum() == 10
    none = outputs(run, model=model, bootstrap=20, matched=0, permutations=99)
    assert set(none.tables["weights"]["weights"]) == {"cosine", "average"}
    assert len(chapter("outputs").draw(none)) == 5


def test_experts_without_plain_weights_have_outputs_all_the_same(model, run, monkeypatch):
    def refused(self, expert):
        raise ModelError("quantised")

    for layer in model.layers:
        monkeypatch.setattr(type(layer), "expert_weights", refused)
    found = outputs(run, model=model, bootstrap=20)
    assert "weights" not in found.tables
    assert "no plain numbers" in found.findings[5].text
    assert len(chapter("outputs").draw(found)) == 4


def test_fewer_tokens_than_were_recorded(model, run):
    found = outputs(run, model=model, bootstrap=20, tokens=100, permutations=9)
    assert rows(found.table, tokens="all")["n_tokens"].max() == 100
    whole = by_hand(model, run)[:, :100]
    alike = torch.cosine_similarity(whole[0], whole[1], dim=1).mean().item()
    pair = rows(found.tables["pairs"], layer=0, expert=0, other_expert=1)
    assert pair["cosine"].item() == pytest.approx(alike, abs=1e-6)


def test_work_is_that_of_all_experts_twice(model):
    # 8 experts of 3 matrices, two operations a weight, and products of 8 by 8 outputs.
    layer = model.layers[0]
    weights = 3 * layer.hidden_size * layer.intermediate_size
    once = 8 * 2 * weights + 2 * 8 * 8 * layer.hidden_size
    assert operations(model, OutputsOptions(tokens=7)) == pytest.approx(2 * 7 * 2 * once)


def test_few_documents_have_no_intervals(model, tmp_path):
    corpus = captures_zoo.corpus(documents=4)
    captures_zoo.record(tmp_path, model, corpus, **RECORD)
    found = outputs(tmp_path, model=model, bootstrap=20)
    assert found.table.value_low.isna().all()
    assert "few_documents" in set(found.table.status)
    assert "No intervals" in found.findings[-1].text
    assert not any("95%" in finding.text for finding in found.findings)


def clustered(seed, *, documents=40, experts=4):
    """Scores and norms that know nothing of each other, but are alike within a document."""
    random = np.random.default_rng(seed)
    owners = np.repeat(np.arange(documents), random.integers(2, 12, size=documents))
    scores, norms = (
        random.normal(size=(documents, experts))[owners]
        + random.normal(size=(len(owners), experts))
        + random.normal(size=experts)
        for _ in "sn"
    )
    return scores, norms, owners


def test_intervals_of_independent_norms_and_scores_hold_zero():
    # 1,000 draws: of a perfect interval 95% hold it, give or take 1.4% (two standard errors).
    inside = {"spearman": 0, "partial": 0}
    for seed in range(1_000):
        scores, norms, owners = clustered(seed)
        scores = scores - scores.mean(0)  # for the plain one, experts must not differ
        found = {
            "spearman": mean_over_tokens(rank_correlations(scores, norms), owners, QUICK),
            "partial": partial_over_tokens(scores, norms, owners, QUICK),
        }
        for name, row in found.items():
            inside[name] += row["value_low"] <= 0 <= row["value_high"]
    assert inside["spearman"] >= 930
    assert inside["partial"] >= 930
    assert max(inside.values()) <= 975


@pytest.mark.parametrize("family", ["llama4_text", "nemotron_h"])
def test_other_families(family, tmp_path):
    the_model = load(deviants_zoo.DEVIANTS[family]())
    captured(the_model, tmp_path)
    found = outputs(tmp_path, model=the_model, bootstrap=20)
    assert rows(found.table, tokens="all", pairs="all").value.notna().all()
    says_so = any("without it" in finding.text for finding in found.findings)
    assert says_so == (family == "llama4_text")


def test_offloaded_it_is_the_same(tmp_path):
    models_zoo.build("mixtral").save_pretrained(tmp_path / "model")
    whole, offloaded = (load(tmp_path / "model", device_map=at) for at in (None, {"": "disk"}))
    captured(whole, tmp_path / "run")
    with torch.no_grad():
        tables = [
            of_layer(Capture(tmp_path / "run"), one.layers[0], in_memory(one), OutputsOptions())[0]
            for one in (whole, offloaded)
        ]
    pd.testing.assert_frame_equal(tables[0]["pairs"], tables[1]["pairs"])
    assert all(parameter.is_meta for parameter in offloaded.layers[0].block.parameters())


def test_both_stacks_are_measured_and_unused_experts_are_not_chosen(tmp_path):
    the_model = load(deviants_zoo.switch(expert_capacity=3))
    captured(the_model, tmp_path)
    found = outputs(tmp_path, model=the_model, bootstrap=20)
    assert set(found.table["stack"]) == {"decoder", "encoder"}
    for layer in the_model.layers:
        capture = Capture(tmp_path, stack=layer.stack)
        used = (capture.routing(layer.index).experts >= 0).any(1)
        assert 0 < used.sum() < capture.num_tokens
        here = {"stack": layer.stack, "layer": layer.index, "tokens": "all"}
        hits = rows(found.tables["norms"], measure="hit_rate", **here)
        assert hits.n_tokens.item() == used.sum()
        assert rows(found.table, pairs="both_chosen", **here).value.isna().all()
        assert rows(found.table, pairs="all", **here).n_tokens.iloc[0] == capture.num_tokens


def test_a_model_of_one_expert_per_layer_is_refused(tmp_path):
    config = transformers.Qwen2Config(**SMALL)
    dense = load(transformers.Qwen2ForCausalLM(config), dense_as_experts=True)
    captured(dense, tmp_path)
    with pytest.raises(ModelError, match="one expert each"):
        outputs(tmp_path, model=dense)


def test_a_capture_without_what_is_needed_is_refused(model, tmp_path):
    captured(model, tmp_path / "a", record=("routing",))
    with pytest.raises(CaptureError, match="lacks inputs"):
        outputs(tmp_path / "a", model=model)
    captured(model, tmp_path / "b", tokens=0, tokens_per_expert=5)
    with pytest.raises(CaptureError, match="no whole rows"):
        outputs(tmp_path / "b", model=model)


def test_figures(result):
    drawn = chapter("outputs").draw(result)
    assert [figure.name for figure in drawn] == [
        "outputs-depth",
        "outputs-experts",
        "outputs-preference",
        "outputs-ranks",
        "outputs-weights",
    ]
    for figure in drawn:
        assert figure.specification()["datasets"]
        assert figure.title.endswith("?")
