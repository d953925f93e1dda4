from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import kstest, rankdata, spearmanr

import models_zoo
import moescope
from moescope.analyses.align.tokens import held_out_documents
from moescope.analyses.damage.analysis import damage
from moescope.analyses.damage.correlation import (
    Damage,
    correlation,
    difference,
    interval,
    permuted,
    rank_correlation,
)
from moescope.analyses.damage.findings import findings
from moescope.analyses.damage.measures import linear_cka, mean_weights
from moescope.analyses.damage.options import DamageOptions
from moescope.analyses.damage.tables import by_kind
from moescope.analyses.damage.trials import Trial, draw_pairs, experts_of
from moescope.analyses.fits import Source
from moescope.analyses.losses import Losses
from moescope.analyses.material import Material
from moescope.corpora.packing import Packing
from moescope.errors import ModelError, OptionError
from moescope.evaluate.paired import compare
from moescope.interventions import mask_experts, replace_output, swap_experts
from moescope.models.load import load
from moescope.reports.registry import chapter

RUNS = (8, 3, 6, 2, 5, 4, 7, 0)
"""Tokens of each class in a document; nothing is ever sent to the last expert."""
SIZES = ((0.2, 0.9, 0.7, 0.4, 1.2, 0.1, 1.1, 1.0), (0.9, 1.1, 0.1, 0.8, 1.0, 0.05, 0.3, 0.5))
"""How much each expert says, by layer."""


@torch.no_grad()
def planted():
    """Expert e is given the tokens of class e and says that the next one is of the same.

    It says so as loud as `SIZES` has it, so that taking it out costs about that, times how often it
    is used.
    """
    model = load(models_zoo.build("mixtral"))
    tokens = torch.arange(models_zoo.VOCABULARY)
    embedding = model.model.get_input_embeddings().weight.zero_()
    head = model.model.get_output_embeddings().weight.zero_()
    embedding[tokens, tokens % 8] = 20.0
    head[tokens, 8 + tokens % 8] = 1.0
    for layer, sizes in zip(model.layers, SIZES, strict=True):
        layer.decoder_layer.self_attn.o_proj.weight.zero_()
        layer.router_weight.zero_()[:, :8] = 4 * torch.eye(8)
        for expert, size in enumerate(sizes):
            weights = layer.expert_weights(expert)
            weights.gate[:] = weights.up[:] = torch.eye(models_zoo.HIDDEN)[expert] / 10
            weights.down.zero_()[8 + expert] = size / 5
    return model


def documents(number, runs=RUNS, seed=0):
    random = np.random.default_rng(seed)
    tokens = np.arange(3, models_zoo.VOCABULARY)
    return [
        np.concatenate(
            [random.choice(tokens[tokens % 8 == c], runs[c]) for c in random.permutation(8)]
        ).tolist()
        for _ in range(number)
    ]


def text(number=160, **changes):
    return moescope.Corpus.from_token_ids({"only": documents(number, **changes)}, PACKING)


PACKING = Packing(length=sum(RUNS), rows=32, packed=False)
OPTIONS = {"pairs": 8, "targets": 0, "tokens": 2_000, "measure_tokens": 3_000, "halves": 20}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("damage")
    model = planted()
    moescope.capture(model, text(), folder, record=("routing", "inputs"))
    return folder, model


@pytest.fixture(scope="module")
def result(run):
    folder, model = run
    return damage(folder, model=model, corpus=text(), **OPTIONS)


def test_planted_damage_follows_the_router_weighted_norm(result):
    rows = result.table.query("kind == 'zero' and ranks == 'within layers'")
    rows = rows.set_index("measure").correlation.sort_values(ascending=False)
    assert set(rows.index[:2]) == {"weighted_norm", "ean"}  # all weights are 1
    assert rows["weighted_norm"] > 0.97
    assert rows["weighted_norm"] > rows["frequency"] + 0.05
    assert rows["weighted_norm"] > rows["reap"] + 0.03
    assert "router-weighted norm" in result.findings[0].text or "EAN" in result.findings[0].text


def test_experts_that_are_never_used_cost_nothing(result):
    rows = result.tables["changes"].query("kind in ('zero', 'mask') and expert == 7")
    assert len(rows) == 4
    assert (rows.rise.abs() < 1e-7).all()
    others = result.tables["changes"].query("kind == 'zero' and expert != 7")
    assert (others.rise_low > 0).all()


def test_losses_are_those_of_compare_on_the_held_out_documents(run, result):
    _, model = run
    rows = result.tables["changes"]
    one = rows[(rows.kind == "swap")].iloc[0]
    numbers = [(one.layer, one.expert), (one.other_layer, one.other_expert)]
    pair = [(model.layer(int(layer)), int(expert)) for layer, expert in numbers]
    held_out = held_out_documents(moescope.Capture(run[0]), 0.2, 0)
    found = compare(
        model,
        text(),
        {
            "zero": lambda: replace_output((model.layers[0], 4), 0.0),
            "mask": lambda: mask_experts(model.layers[1], [2]),
            "swap": lambda: swap_experts(*pair),
        },
        documents=held_out,
    )
    expected = found[found.domain == "all"].set_index("intervention")
    here = rows[(rows.kind == "zero") & (rows.layer == 0) & (rows.expert == 4)].iloc[0]
    assert here.rise == pytest.approx(expected.difference["zero"], abs=1e-6)
    assert here.n_tokens == expected.n_tokens["zero"]
    assert here.rise_low == pytest.approx(expected.difference_low["zero"], rel=1e-3)
    here = rows[(rows.kind == "mask") & (rows.layer == 1) & (rows.expert == 2)].iloc[0]
    assert here.rise == pytest.approx(expected.difference["mask"], abs=1e-6)
    assert one.rise == pytest.approx(expected.difference["swap"], abs=1e-6)


def test_measures_are_of_other_documents(run, result):
    capture = moescope.Capture(run[0])
    others = ~held_out_documents(capture, 0.2, 0)
    rows = result.tables["changes"].query("kind == 'zero' and layer == 0").set_index("expert")
    used = capture.routing(0).experts[others[capture.documents]]
    routed = np.bincount(used.flatten(), minlength=8)
    assert (rows.frequency <= routed).all()
    assert spearmanr(rows.frequency, routed).statistic > 0.95
    expected = mean_weights(capture, 0, others)
    np.testing.assert_allclose(rows.mean_weight, expected)
    chosen = capture.routing(0).weights[others[capture.documents]][used == 3]
    assert rows.mean_weight[3] == pytest.approx(float(chosen.mean()), rel=1e-5)


def test_it_goes_on_where_it_was_interrupted(run, result, monkeypatch):
    folder, model = run

    def fail(*_):
        raise AssertionError("computed again")

    monkeypatch.setattr(Losses, "_measured", fail)
    again = damage(folder, model=model, corpus=text(), **OPTIONS)
    pd.testing.assert_frame_equal(again.table, result.table)


def test_substitutions_are_measured_where_adapters_can_be_fitted(tmp_path):
    model = load(models_zoo.build("mixtral"))
    ids = np.random.default_rng(0).integers(3, 97, size=(160, 24)).tolist()
    corpus = moescope.Corpus.from_token_ids({"a": ids}, Packing(length=24, rows=32, packed=False))
    moescope.capture(model, corpus, tmp_path, record=("routing", "inputs"))
    options = {"pairs": 4, "targets": 0, "tokens": 300, "measure_tokens": 300, "max_tokens": 300}
    found = damage(tmp_path, model=model, corpus=corpus, **options)
    changes = found.tables["changes"].query("kind == 'substitute'")
    assert len(changes) == 4
    assert changes.aligned_fvu.notna().all()
    assert len(set(changes.stratum)) == 1
    swaps = found.tables["changes"].query("kind == 'swap'").reset_index()
    assert (swaps.frequency != changes.reset_index().frequency).any()
    for figure in chapter("damage").draw(found):
        assert figure.specification()["datasets"]


def of(values, strata, noise=0.0, random=None, tastes=0.0):
    """Damage measured on 32 documents, with noise about each of their values.

    Each document may have a value, or values, of its own beside that.
    """
    rises = values + tastes + noise * (random or np.random).normal(size=(32, len(values)))
    drawn = np.random.default_rng(0).multinomial(32, np.full(32, 1 / 32), size=100)
    estimates = np.concatenate([np.ones((1, 32)), drawn]) @ rises / 32
    return Damage(estimates=estimates, strata=np.asarray(strata), documents=32)


def test_correlations_are_spearmans():
    random = np.random.default_rng(0)
    one, other = random.integers(0, 6, size=(2, 20)).astype(float)
    found = correlation(one, of(other, [0] * 20))
    assert found.value == pytest.approx(spearmanr(one, other).statistic)
    np.testing.assert_allclose(found.resampled, found.value)
    for e in (0, 7, 19):
        rest = np.delete(one, e), np.delete(other, e)
        assert found.without[e] == pytest.approx(spearmanr(*rest).statistic)
    strata = np.repeat([0, 1, 2, 3], 5)
    ranks = [np.concatenate([rankdata(v[strata == s]) - 3 for s in range(4)]) for v in (one, other)]
    expected = np.corrcoef(*ranks)[0, 1]
    assert rank_correlation(one, other, strata) == pytest.approx(expected)
    left_out = correlation(one, of(other, strata)).without[7]
    kept = np.arange(20) != 7
    assert left_out == pytest.approx(rank_correlation(one[kept], other[kept], strata[kept]))
    assert len(correlation(one[kept], of(other, [0] * 20).where(kept)).without) == 19


def test_depth_alone_is_no_correlation_within_layers():
    strata = np.repeat(np.arange(6), 8)
    random = np.random.default_rng(1)
    one, other = (10 * strata + random.normal(size=48) for _ in range(2))
    assert rank_correlation(one, other, 0 * strata) > 0.95
    assert abs(rank_correlation(one, other, strata)) < 0.4


def test_p_values_are_uniform_where_labels_are_permuted():
    random = np.random.default_rng(2)
    strata = np.repeat(np.arange(3), 8)
    measure = random.normal(size=24) + strata
    damage_of = np.exp(random.normal(size=24) + 3 * strata)
    p_values = []
    for draw in range(400):
        order = np.concatenate([random.permutation(np.flatnonzero(strata == s)) for s in range(3)])
        found = of(damage_of[order], strata)
        p_values.append(permuted(correlation(measure, found), measure, found, draw))
    assert kstest(p_values, "uniform").pvalue > 0.01
    assert 0.025 < np.mean(np.array(p_values) <= 0.05) < 0.08


@pytest.mark.parametrize(("changes", "together"), [(48, 8), (24, 4)])
@pytest.mark.parametrize("taste", [0, 2])
def test_intervals_cover_and_tests_do_not_find_what_is_not_there(changes, together, taste):
    """Documents may differ in what they ask of experts: then the measure matters in some only."""
    random = np.random.default_rng(3)
    strata = np.arange(changes) // together
    inside, clear, seen = 0, 0, 0
    for strength, draws in ((0.0, 200), (2.0, 40)):
        for draw in range(draws):
            measure, other = random.normal(size=(2, changes))
            tastes = taste * random.normal(size=(32, 1)) * measure
            found = of(other + strength * measure, strata, 0.5, random, tastes)
            estimates = correlation(measure, found)
            one = interval(estimates, permuted(estimates, measure, found, draw))
            assert one.status == "ok"
            if strength:
                seen += one.low > 0 and one.p_value <= 0.05
            else:
                inside += one.low <= 0 <= one.high
                clear += one.p_value <= 0.05
    assert inside >= 186
    assert clear <= 16
    assert seen >= 25


def test_differences_of_measures_are_paired():
    random = np.random.default_rng(4)
    truth = random.normal(size=24)
    found = of(truth, np.repeat(np.arange(3), 8), noise=0.06, random=random)
    good, near, bad = (
        correlation(truth + noise * random.normal(size=24), found) for noise in (0.3, 0.31, 30.0)
    )
    one = difference(good, bad)
    assert one.value == pytest.approx(good.value - bad.value)
    assert one.low > 0
    assert one.p_value < 0.05
    assert difference(good, near).low < 0 < difference(good, near).high
    same = difference(good, good)
    assert (same.value, same.low, same.high, same.p_value) == (0, 0, 0, 1)


def test_few_changes_or_documents_give_no_interval():
    values = np.arange(4.0)
    assert interval(correlation(values, of(values, [0] * 4)), 0.5).status == "few_changes"
    few = replace(of(np.arange(8.0), [0] * 8), documents=20)
    assert interval(correlation(np.arange(8.0), few), 0.5).status == "few_documents"
    flat = correlation(np.ones(8), of(np.arange(8.0), [0] * 8))
    assert interval(flat, 0.5).status == "undefined"


def test_linear_cka_is_that_of_its_definition():
    random = torch.Generator().manual_seed(0)
    one = torch.randn(30, 4, generator=random)
    turn = torch.linalg.qr(torch.randn(4, 4, generator=random))[0]
    assert linear_cka(one, 3 * one @ turn + 1) == pytest.approx(1)
    other = torch.randn(30, 4, generator=random)
    centre = torch.eye(30) - 1 / 30
    k, m = (centre @ v @ v.T @ centre for v in (one, other))
    expected = (k * m).sum() / (k.norm() * m.norm())
    assert linear_cka(one, other) == pytest.approx(float(expected), rel=1e-4)


def test_no_expert_comes_in_two_pairs():
    model = load(models_zoo.build("mixtral"))
    experts = experts_of(model)
    pairs = draw_pairs(model, experts, 60, 0)
    assert len(pairs) == len(experts) // 2 == 8
    assert len({expert for pair in pairs for expert in pair[:2]}) == 16
    for draw in (0, 1):
        some = [pair for pair in pairs if pair.draw == draw]
        assert len(some) == 4
        assert len({(pair.one.layer, pair.other.layer) for pair in some}) == 1
    assert pairs[:5] == draw_pairs(model, experts, 5, 0)
    assert pairs != draw_pairs(model, experts, 60, 1)
    within = draw_pairs(model, experts[:8], 60, 0)
    assert len({expert for pair in within for expert in pair[:2]}) == 8


def test_measures_stay_with_their_experts_where_some_cannot_be_masked():
    experts = [Source(0, 0), Source(0, 1), *(Source(1, e) for e in range(4))]
    places = [Trial("mask", one) for one in experts[2:]]
    index = pd.MultiIndex.from_tuples([("a", 0), ("a", 1)], names=["domain", "document"])
    losses = {
        trial: pd.DataFrame({"tokens": 5, "difference": float(trial.one.expert)}, index=index)
        for trial in places
    }
    frame = pd.DataFrame(
        {"frequency": [70.0, 71, 10, 11, 12, 13]}, index=[str(one) for one in experts]
    )
    (found,) = by_kind(places, losses, {"mask": frame})
    assert found.measures["frequency"].tolist() == [10, 11, 12, 13]


def test_findings_call_nothing_a_difference_that_is_none(result):
    tables = dict(result.tables)
    tables["differences"] = tables["differences"].assign(p_corrected=0.5)
    said = findings(tables)[0].text
    assert "not shown to be better than any" in said
    tables["differences"] = tables["differences"].assign(p_corrected=0.01)
    assert "It is better than" in findings(tables)[0].text
    tables["damage"] = tables["damage"].assign(p_corrected=1.0)
    assert "0 of" in findings(tables)[0].text


def test_figures(result):
    drawn = chapter("damage").draw(result)
    assert len(drawn) == 3
    for figure in drawn:
        assert figure.specification()["datasets"]
        assert figure.title.endswith("?")


def test_encoder_decoder_models_are_refused(run, monkeypatch):
    folder, model = run
    monkeypatch.setattr(Material, "model", model)
    monkeypatch.setattr(model.model.config, "is_encoder_decoder", True)
    with pytest.raises(ModelError, match="encoder-decoder"):
        damage(folder, model=model, corpus=text())


@pytest.mark.parametrize(
    ("options", "said"),
    [({"pairs": -1}, "pairs"), ({"tokens": 0}, "tokens"), ({"held_out_share": 1.0}, "share")],
)
def test_options_that_say_nothing_are_refused(options, said):
    with pytest.raises(OptionError, match=said):
        DamageOptions(**options)
