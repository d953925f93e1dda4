import dataclasses
import json
import math
import re
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import t as student

import moescope
from models_zoo import build
from moescope.alignment.options import RANDOM_SEEDS
from moescope.alignment.score import Errors, score_of
from moescope.analyses.atlas import sources as atlas_sources
from moescope.analyses.atlas.analysis import atlas, operations
from moescope.analyses.atlas.chance import PAIR, chance_p_values, random_rows, tail_p_values
from moescope.analyses.atlas.cost import Shape, counts, fit_operations, shapes_of
from moescope.analyses.atlas.options import AtlasOptions, sampled_experts, shortlisted
from moescope.analyses.atlas.plan import Gpu, atlas_plan
from moescope.analyses.atlas.recall import recall
from moescope.analyses.atlas.screening import overlap
from moescope.analyses.atlas.selection import with_stages
from moescope.analyses.atlas.tables import score_p_values, with_p_values
from moescope.cli import main
from moescope.corpora.packing import Packing
from moescope.errors import MoEScopeError, OptionError
from moescope.reports.registry import chapter
from test_reports import Page
from test_reports_browser import CHROMIUM, opened

QUICK = {
    "experts_per_layer": None,
    "steps": 40,
    "short_steps": 20,
    "max_tokens": 800,
    "rejected": 1,
}
LAYERS = 4
EXPERTS = 2


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """A capture of a model of random experts whose block 3 is a copy of block 1."""
    model = build(
        "mixtral",
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_local_experts=EXPERTS,
        num_experts_per_tok=1,
    )
    blocks = [layer.mlp for layer in model.model.layers]
    blocks[3].load_state_dict(blocks[1].state_dict())
    loaded = moescope.load(model)
    ids = np.random.default_rng(0).integers(3, 97, size=(220, 24))
    corpus = moescope.Corpus.from_token_ids({"a": ids.tolist()}, Packing(length=24, packed=False))
    folder = tmp_path_factory.mktemp("planted")
    moescope.capture(loaded, corpus, folder)
    return folder, loaded


@pytest.fixture(scope="module")
def found(planted):
    folder, model = planted
    return atlas(folder, model=model, **QUICK)


def test_a_copied_block_is_the_one_maximum_and_all_its_pairs_are_claimed(found):
    layers = found.tables["layers"].set_index(["source_layer", "target_layer"])
    copies = [(1, 3), (3, 1)]
    others = layers.drop(copies)
    assert len(layers) == LAYERS * (LAYERS - 1)
    assert layers.loc[copies].median_score.min() > 0.8 > 0 > others.best_score.max()
    assert (layers.loc[copies].claimed == EXPERTS).all()
    assert (layers.loc[copies].share_above == 1).all()
    assert (layers.loc[copies].best_low > 0).all()


def test_no_pair_of_independent_random_experts_is_claimed(found):
    table = found.table
    copies = {(1, 3), (3, 1)}
    layers = list(zip(table.source_layer, table.target_layer, strict=True))
    independent = [pair not in copies for pair in layers]
    assert not table.claimed[independent].any()
    assert (table.score_low[independent].dropna() < 0).all()


def test_screening_keeps_every_copy_and_says_so(found):
    table = found.table
    copy = table.source_layer.isin([1, 3]) & table.target_layer.isin([1, 3])
    same = table.source_expert == table.target_expert
    assert (table[copy & same].stage == "converged").all()
    assert (table[copy & same].place == 1).all()
    assert "of 8 experts in 12 ordered pairs of layers" in found.findings[0].text
    assert found.findings[0].numbers["claimed"] == 2 * EXPERTS
    assert "1 \u2192 3 (2 of 2" in found.findings[1].text


def test_every_pair_has_a_row_and_only_fitted_ones_have_numbers(found):
    table = found.table
    assert len(table) == LAYERS * EXPERTS * (LAYERS - 1) * EXPERTS
    assert not table.duplicated(
        ["source_layer", "source_expert", "target_layer", "target_expert"]
    ).any()
    fitted = (table.stage == "converged") | table.sampled
    assert (table.fvu.notna() == fitted).all()
    assert table[fitted].score.notna().all()
    assert (table.groupby(["source_layer", "source_expert"]).sampled.sum() == 1).all()
    assert (table[fitted].fvu_linear > 0).all()
    random = found.tables["random"]
    means = random[random.kind == "same output space"].groupby(PAIR).fvu.mean()
    kept = table[fitted].set_index(PAIR).fvu_random_down
    assert means.to_dict() == pytest.approx(kept.to_dict(), rel=1e-6)


def test_a_second_call_computes_nothing(planted, found, tmp_path, monkeypatch):
    folder, model = planted

    def fail(*_args, **_options):
        raise AssertionError("computed again")

    monkeypatch.setattr("moescope.analyses.atlas.screening.train_groups", fail)
    monkeypatch.setattr("moescope.analyses.fits.fit_pairs", fail)
    again = atlas(folder, model=model, **QUICK)
    pd.testing.assert_frame_equal(again.table, found.table)
    assert again.tables["cost"].empty
    shutil.copytree(folder, tmp_path / "run")
    parts = (tmp_path / "run").glob("results/atlas/*/L*E*.parquet")
    for part in parts:
        part.write_bytes(part.read_bytes()[:-20])
    with pytest.raises(MoEScopeError, match="cannot read .*L0E0.parquet"):
        atlas(tmp_path / "run", model=model, **QUICK)


def test_the_cost_of_a_call_is_in_its_result(found):
    cost = found.tables["cost"].set_index("fits_of")
    pairs = LAYERS * EXPERTS * (LAYERS - 1 + 1)  # one of every other layer, one drawn
    controls = LAYERS * EXPERTS * (RANDOM_SEEDS + 1)
    assert cost.loc["converged", "fits"] == pairs * (1 + RANDOM_SEEDS) + controls
    assert cost.loc["short", "fits"] == LAYERS * EXPERTS * (LAYERS - 1)
    assert (cost.seconds > 0).all()


def test_figures_and_columns(found):
    drawn = chapter("atlas").draw(found)
    assert [figure.name for figure in drawn] == ["atlas-layers"]
    assert "at first 1 \u2192 3" in drawn[0].how_to_read or "at first 3" in drawn[0].how_to_read
    drawn[0].specification()


def test_a_full_run_measures_the_recall_of_the_screening(planted):
    folder, model = planted
    result = atlas(folder, model=model, **QUICK | {"survivors": None, "controls": False})
    assert (result.table.stage == "converged").all()
    rows = result.tables["recall"].set_index("measure")
    assert rows.loc["best kept", "chance"] == 0.5
    assert 0 <= rows.loc["best kept", "value"] <= 1
    assert "Every pair was fitted" in " ".join(f.text for f in result.findings)
    assert [f.name for f in chapter("atlas").draw(result)] == ["atlas-layers", "atlas-recall"]


def pairs_of(fvu, place, stage, sampled=False):
    number = len(fvu)
    return pd.DataFrame(
        {
            "source_layer": 0,
            "source_expert": np.arange(number) // 4,
            "target_layer": 1,
            "target_expert": np.arange(number) % 4,
            "fvu": fvu,
            "place": place,
            "stage": stage,
            "sampled": sampled,
        }
    )


def test_recall_by_hand():
    # The first source's best is in place 2, the second's in place 1.
    pairs = pairs_of([0.5, 0.4, 0.8, 0.9, 0.1, 0.2, 0.3, 0.4], [1, 2, 3, 4] * 2, "converged")
    rows = recall(pairs).set_index(["measure", "kept"])
    assert rows.loc[("best kept", 1), "value"] == 0.5
    assert rows.loc[("best kept", 2), "value"] == 1
    assert rows.loc[("best kept", 3), "chance"] == 0.75
    ranks = (1 + 0.8) / 2  # Spearman of 2134 is 1 - 6 * 2 / (4 * 15)
    assert rows.loc[("rank correlation", 0), "value"] == pytest.approx(ranks)


def test_estimated_recall_by_hand():
    stage = ["converged", "short fit", "overlap", "overlap"] * 2
    sampled = [False, True, True, False] * 2
    pairs = pairs_of([0.5, 0.4, 0.8, np.nan] * 2, [1, 2, 3, 4] * 2, stage, sampled)
    rows = recall(pairs).set_index("measure")
    # Half of the drawn are better: of three rejected, 1.5 beside the one that was kept.
    assert rows.loc["rejected better", "value"] == 0.5
    assert rows.loc["recall, estimated", "value"] == 1 / 2.5
    assert rows.loc["recall, estimated", "low"] < 0.4 < rows.loc["recall, estimated", "high"]


def test_estimated_recall_counts_a_drawn_pair_for_all_that_it_was_drawn_from():
    pairs = pd.DataFrame(
        {
            "source_layer": 0,
            "source_expert": [0, 0, 1, 1, 1, 1],
            "target_layer": [1, 1, 2, 2, 2, 2],  # of two experts, and of four
            "target_expert": [0, 1, 0, 1, 2, 3],
            "fvu": [0.5, 0.4, 0.5, 0.6, np.nan, np.nan],
            "stage": ["converged", "overlap", "converged", "overlap", "overlap", "overlap"],
            "sampled": [False, True, False, True, False, False],
        }
    )
    rows = recall(pairs).set_index("measure")
    assert rows.loc["rejected better", "value"] == 1 / 4  # one of one, none of three
    assert rows.loc["recall, estimated", "value"] == pytest.approx(2 / 3)


def test_estimated_recall_is_near_the_true_one_in_the_mean():
    random = np.random.default_rng(0)
    found, truth = [], []
    for _ in range(100):
        fvu = random.normal(size=(12, 4, 8))  # imitated experts, layers, experts of a layer
        place = (fvu + random.normal(size=fvu.shape)).argsort(-1).argsort(-1) + 1
        kept = place == 1
        truth.append(kept.sum() / (fvu <= fvu[kept].reshape(12, 4, 1)).sum())
        drawn = np.zeros_like(kept)
        for source in range(12):
            rejected = np.argwhere(~kept[source])
            drawn[(source, *rejected[random.permutation(len(rejected))[:2]].T)] = True
        numbers = np.indices(fvu.shape).reshape(3, -1)
        names = ("source_expert", "target_layer", "target_expert")
        pairs = pd.DataFrame(dict(zip(names, numbers, strict=True))).assign(
            source_layer=0,
            fvu=np.where(kept | drawn, fvu, np.nan).ravel(),
            stage=np.where(kept, "converged", "overlap").ravel(),
            sampled=drawn.ravel(),
        )
        rows = recall(pairs).set_index("measure")
        found.append(rows.loc["recall, estimated", ["value", "low", "high"]])
    value, low, high = np.array(found, float).T
    # A share in the denominator: the estimate of 24 drawn pairs is a little too large.
    assert abs(value.mean() - np.mean(truth)) < 0.05
    assert ((low <= truth) & (truth <= high)).mean() > 0.93


def test_stages_and_the_drawn_sample():
    pairs = pairs_of([np.nan] * 4, [1, 2, 3, 4], "")
    screened = pairs.assign(short_fvu=[0.1, 0.2, np.nan, np.nan])
    options = AtlasOptions(survivors=1, rejected=2)
    staged = with_stages(screened, options)
    assert staged.stage.tolist() == ["converged", "short fit", "overlap", "overlap"]
    assert staged.sampled.tolist()[0] is False
    assert staged.sampled.sum() == 2
    assert with_stages(screened, options).equals(staged)
    everything = with_stages(screened, AtlasOptions(survivors=None))
    assert (everything.stage == "converged").all()
    assert not everything.sampled.any()


def test_overlap_against_covariances_and_its_invariance():
    random = torch.Generator().manual_seed(0)
    one = torch.randn(300, 8, generator=random) @ torch.randn(8, 8, generator=random)
    other = torch.randn(200, 8, generator=random)
    c, d = np.cov(one.numpy().T), np.cov(other.numpy().T)
    expected = np.trace(c @ d) / np.linalg.norm(c) / np.linalg.norm(d)
    assert overlap(one, other) == pytest.approx(expected, rel=1e-4)
    shuffled = one[torch.randperm(300, generator=random)]
    assert overlap(one, 3 * shuffled + 1) == pytest.approx(1, abs=1e-5)
    assert overlap(one[:, :4] @ torch.eye(4, 8), other[:, 4:] @ torch.eye(4, 8).flip(1)) < 1e-6
    assert math.isnan(overlap(one, torch.ones(5, 8)))


def errors_without_likeness(random, documents=30):
    """A pair and ten random targets of one law: a level of each, and noise by document."""
    total = random.lognormal(0, 1, documents)

    def one():
        level = 0.9 + 0.05 * random.standard_normal()
        return total * level * random.lognormal(0, 0.3, documents)

    return Errors(
        total=total,
        pair=one(),
        linear=2 * total,
        ceiling=0.1 * total,
        random=np.array([[one() for _ in range(RANDOM_SEEDS)] for _ in range(2)]),
    )


def test_p_values_are_not_too_small_where_nothing_is_alike():
    random = np.random.default_rng(0)
    scores = [score_of(errors_without_likeness(random), seed) for seed in range(1_000)]
    found = [np.array([getattr(s, name) for s in scores]) for name in ("value", "low")]
    p_values = score_p_values(*found)
    assert np.isfinite(p_values).all()
    for level in (0.05, 0.01, 0.002):
        allowed = level + 3 * math.sqrt(level * (1 - level) / len(scores))
        assert (p_values < level).mean() <= allowed


def test_p_value_at_the_end_of_the_interval_and_correction_for_all_pairs():
    # An interval that ends at zero is a one-sided test at 2.5%.
    assert score_p_values(np.array([0.5]), np.array([0.0]))[0] == pytest.approx(0.025)
    frame = pd.DataFrame(dict(zip(PAIR, np.indices((1, 1, 1, 100)).reshape(4, -1), strict=True)))
    frame["score"] = [1.0, 0.2] + [np.nan] * 98
    frame["score_low"] = [0.97, 0.1] + [np.nan] * 98
    frame["fvu"] = [1e-9, 0.1] + [np.nan] * 98
    beside = {"kind": (0.9, 1.0, 1.1, 1.0, 0.9)}
    random = pd.DataFrame([row for i in range(2) for row in random_rows((0, 0, 0, i), beside)])
    corrected = with_p_values(frame, random)
    p = score_p_values(np.array([1.0]), np.array([0.97]))[0]
    assert corrected.p_holm[0] == pytest.approx(100 * p)  # for those that screening left out too
    assert corrected.claimed.tolist() == [True] + [False] * 99
    assert corrected.p_holm[2:].isna().all()
    # No better than its random experts, whatever the interval says.
    frame.loc[0, "fvu"] = 0.95
    assert not with_p_values(frame, random).claimed.any()


def test_a_p_value_of_chance_by_hand():
    chance = np.array([-2.0, -1, 0.1, 0.2, 0.4])
    values = np.array([-1.0, 0.2, 0.3, 0.4, 0.8, np.nan])
    expected = []
    for x in values[1:-1]:
        bounds = [(k + 1) / 6 * min(1, q / x) ** 4 for k, q in ((1, 0.4), (2, 0.2), (3, 0.1))]
        expected.append(max(bounds))
    assert expected[:3] == [3 / 6, 2 / 6, 2 / 6]
    assert tail_p_values(values, chance).tolist() == pytest.approx(
        [1, *expected, np.nan], nan_ok=True
    )


def outliers(random, size):
    """Levels of FVU of which three in a hundred lie far out, on the low side."""
    return (0.9 + 0.03 * random.normal(size=size)) * np.where(random.random(size) < 0.03, 0.6, 1)


def skewed(random, size):
    return np.maximum(0.95 - 0.05 * random.exponential(size=size), 0.03)


def uneven(random, size):
    """Some sources spread ten times as much as others."""
    return 0.9 * np.exp(-random.lognormal(-4, 1, (size[0], 1, 1)) * random.exponential(size=size))


@pytest.mark.parametrize("levels", [outliers, skewed, uneven])
def test_chance_alone_claims_no_pair_and_a_copy_is_claimed(levels):
    """The best of 8 in 5 layers for 12 experts; random experts of one law with them."""
    random, number = np.random.default_rng(0), 12 * 5 * 8
    pairs = pd.DataFrame(dict(zip(PAIR, np.indices((1, 12, 5, 1)).reshape(4, -1), strict=True)))
    table = pd.concat([pairs.loc[pairs.index.repeat(5)]] * 2, ignore_index=True)
    table = table.assign(kind=np.repeat(["down", "all"], 300), number=np.arange(600) % 5)
    false, true, too_many = 0, 0, 0
    for atlas_number in range(100):
        own = levels(random, (12, 5, 18))
        fvu, down, others = own[..., :8].min(-1).ravel(), own[..., 8:13], own[:, :1, 13:]
        table["fvu"] = np.stack([down, np.broadcast_to(others, down.shape)]).ravel()
        false += (chance_p_values(pairs.assign(fvu=fvu), table) * number < 0.05).any()
        # What five random experts of its own say of a pair: a t test of one more.
        down = down.reshape(-1, 5)
        t = (down.mean(1) - fvu) / down.std(1, ddof=1) / math.sqrt(1.2)
        too_many += (student.sf(t, 4) * number < 0.05).any()
        if atlas_number < 30:
            fvu[7] = 0.05
            true += chance_p_values(pairs.assign(fvu=fvu), table)[7] * number < 0.05
    assert false <= 0.05 * 100 + 2 * math.sqrt(100 * 0.05 * 0.95)
    assert true >= 26
    assert too_many > 0.05 * 100


def test_counts_by_hand():
    shapes = [Shape(4, 32, 64)] * 3
    options = AtlasOptions(experts_per_layer=None, survivors=1, rejected=2, shortlist=0.5)
    need = counts(shapes, options)
    assert (need.sources, need.pairs) == (12, 12 * 8)
    assert need.short_fits == 12 * 2 * 2
    assert need.converged_pairs == 12 * (2 + 2)
    assert need.converged_fits == 12 * (4 * (1 + RANDOM_SEEDS) + RANDOM_SEEDS + 1)
    without = counts(shapes, dataclasses.replace(options, controls=False))
    assert without.converged_fits == without.converged_pairs
    more = dataclasses.replace(options, steps=600)
    ratio = fit_operations(shapes[0], more.converged_fit(), 1_000) / fit_operations(
        shapes[0], options.converged_fit(), 1_000
    )
    assert ratio == pytest.approx(2, rel=0.02)  # but for its start


def test_layers_of_different_shapes_and_the_counts_of_their_fits(tmp_path):
    whole, other = (
        build("mixtral", intermediate_size=wide, num_local_experts=2, num_hidden_layers=3)
        for wide in (64, 48)
    )
    whole.model.layers[1].mlp = other.model.layers[1].mlp
    model = moescope.load(whole)
    ids = np.random.default_rng(0).integers(3, 97, size=(40, 24)).tolist()
    corpus = moescope.Corpus.from_token_ids({"a": ids}, Packing(length=24, packed=False))
    moescope.capture(model, corpus, tmp_path)
    options = QUICK | {"steps": 2, "short_steps": 2, "max_tokens": 400, "rejected": 0}
    result = atlas(tmp_path, model=model, **options)
    cost = result.tables["cost"].set_index("fits_of")
    need = counts([Shape(2, 32, 64), Shape(2, 32, 48), Shape(2, 32, 64)], AtlasOptions(**options))
    assert len(result.table) == need.pairs == 6 * 4
    assert result.table.fvu.notna().sum() == need.converged_pairs == 6 * 2
    # All-random experts are shared by targets of one shape: of two shapes for four experts.
    controls = RANDOM_SEEDS * (12 + 4 * 2 + 2 * 1) + 6
    assert cost.loc["converged", "fits"] == need.converged_fits == 12 + controls
    assert cost.loc["short", "fits"] == need.short_fits
    most = need.short_operations + need.converged_operations
    assert 0.9 * most < cost.operations.sum() <= 1.1 * most  # which of the rejected is drawn


def test_the_rejected_are_drawn_from_where_there_are_some():
    """A layer of one expert has none, and leaves the others as many."""
    options = AtlasOptions(experts_per_layer=None, rejected=3, controls=False)
    need = counts([Shape(2, 32, 64), Shape(1, 32, 64), Shape(4, 32, 64)], options)
    assert need.converged_pairs == 2 * (2 + 3) + (2 + 3) + 4 * (2 + 1)


def test_a_configuration_is_enough_for_a_dry_run(tmp_path, capsys):
    model = build("qwen2_moe", num_hidden_layers=3)
    model.config.save_pretrained(tmp_path)
    quick = ["--experts-per-layer", "2", "--steps", "5", "--max-tokens", "300"]
    assert main(["atlas", str(tmp_path), "--dry-run", "--json", *quick]) == 0
    plan = json.loads(capsys.readouterr().out)
    options = AtlasOptions(experts_per_layer=2, steps=5, max_tokens=300)
    assert plan["counts"] == dataclasses.asdict(
        counts(shapes_of(moescope.load(model), options), options)
    )
    assert plan["seconds"]["0"] > 0
    (tmp_path / "config.json").write_text("{")
    assert main(["atlas", str(tmp_path), "--dry-run"]) == 1
    assert "cannot read the configuration" in capsys.readouterr().err
    (tmp_path / "config.json").unlink()
    assert main(["atlas", str(tmp_path), "--dry-run"]) == 1
    assert "holds no config.json" in capsys.readouterr().err


def test_the_plan_says_what_is_predicted_and_what_assumed(planted):
    _, model = planted
    options = AtlasOptions(experts_per_layer=None, max_tokens=200)
    plan = atlas_plan(model, options, Gpu(peak=1e12, share=0.5))
    assert plan.counts.operations == operations(model, options)
    assert plan.seconds(1) == pytest.approx(8 * plan.seconds(8))
    assert plan.seconds(1) == pytest.approx(plan.counts.operations / 0.5e12)
    assert plan.seconds() > 0
    assert "predicted, not measured here" in str(plan)
    assert plan.as_dict()["seconds"][1] == plan.seconds(1)
    assert plan.everything.short_operations >= plan.counts.short_operations


def test_the_same_experts_take_part_in_every_pair_of_layers():
    model = moescope.load(build("mixtral"))
    few = sampled_experts(model, AtlasOptions(experts_per_layer=3))
    assert [len(chosen) for chosen in few.values()] == [3, 3]
    assert few == sampled_experts(model, AtlasOptions(experts_per_layer=3))
    assert few != sampled_experts(model, AtlasOptions(experts_per_layer=3, seed=1))
    assert sampled_experts(model, AtlasOptions(experts_per_layer=None))[0] == list(range(8))
    assert shortlisted(8, AtlasOptions(shortlist=0.5, survivors=6)) == 6


def test_few_tokens_give_a_status_and_no_numbers(tmp_path):
    model = moescope.load(build("mixtral", num_local_experts=2, num_experts_per_tok=1))
    ids = np.random.default_rng(0).integers(3, 97, size=(4, 20)).tolist()
    corpus = moescope.Corpus.from_token_ids({"a": ids}, Packing(length=20, packed=False))
    moescope.capture(model, corpus, tmp_path)
    result = atlas(tmp_path, model=model, **QUICK)
    assert result.table.fvu.isna().all()
    assert "No number could be had" in result.findings[0].text
    assert chapter("atlas").draw(result) == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"experts_per_layer": 0}, "experts_per_layer is too small"),
        ({"survivors": 0}, "survivors is too small"),
        ({"shortlist": 0.0}, "shortlist is no share"),
        ({"held_out_share": 1.0}, "held_out_share is no share"),
        ({"rank": -1}, "`rank` is negative"),
    ],
)
def test_unfit_options_are_refused(options, words):
    with pytest.raises(OptionError, match=words):
        AtlasOptions(**options)


def test_a_model_of_one_layer_is_refused():
    model = moescope.load(build("mixtral", num_hidden_layers=1))
    with pytest.raises(OptionError, match="no pair of decoder layers with experts"):
        sampled_experts(model, AtlasOptions())


def test_layers_can_be_chosen():
    model = moescope.load(build("mixtral", num_hidden_layers=3))
    assert list(sampled_experts(model, AtlasOptions(layers=(2, 0)))) == [0, 2]
    with pytest.raises(OptionError, match="no pair of decoder layers"):
        sampled_experts(model, AtlasOptions(layers=(1,)))


def test_screening_is_kept_apart_from_what_it_does_not_depend_on():
    assert set(atlas_sources._NOT_OF_SCREENING) <= {
        f.name for f in dataclasses.fields(AtlasOptions)
    }


CLICK = """
<!doctype html><meta charset="utf-8"><iframe src="{page}" width="1200" height="3000"></iframe>
<script>
const frame = document.querySelector("iframe");
const pause = () => new Promise((done) => setTimeout(done, 300));
const cells = (side) => [...frame.contentDocument.querySelectorAll("#atlas-layers path")]
  .map((mark) => [mark, mark.__data__?.tooltip])
  .filter(([, told]) => told?.layers && (side === "experts") === ("imitated expert" in told));
const shown = () => cells("experts").map(([, told]) =>
  [told.layers, +told["imitated expert"], +told["imitating expert"], told["{shown}"]]);
async function probe() {{
  const page = frame.contentDocument;
  if (page.documentElement.dataset.charts !== "drawn") return setTimeout(probe, 100);
  const found = {{ layers: cells("layers").map(([, told]) => told.layers), first: shown() }};
  const [mark] = cells("layers").find(([, told]) => told.layers === "{clicked}");
  const box = mark.getBoundingClientRect();
  const place = {{ bubbles: true, clientX: box.x + 2, clientY: box.y + 2 }};
  for (const type of ["pointerdown", "pointerup", "click"])
    mark.dispatchEvent(new PointerEvent(type, place));
  await pause();
  found.clicked = shown();
  const selector = page.querySelector("#atlas-layers select");
  selector.value = "{picture}";
  selector.dispatchEvent(new Event("change", {{ bubbles: true }}));
  await pause();
  found.selected = shown();
  document.body.dataset.found = JSON.stringify(found);
}}
frame.addEventListener("load", probe);
</script>
"""


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_a_click_on_a_pair_of_layers_shows_its_experts(found, tmp_path):
    found.save(tmp_path / "results")
    page = moescope.report(tmp_path)
    probe = tmp_path / "probe.html"
    words = {"shown": "score, R\u00b2 or overlap", "picture": "overlap of outputs"}
    probe.write_text(
        CLICK.format(page=page.as_uri(), clicked="2 \u2192 0", **words), encoding="utf-8"
    )
    document, console = opened(probe, tmp_path / "profile", "--allow-file-access-from-files")
    assert console == []
    body = next(a for tag, a in Page(document).elements if tag == "body")
    seen = json.loads(body["data-found"])
    assert len(seen["layers"]) == LAYERS * (LAYERS - 1)
    assert {row[0] for row in seen["first"]} <= {"1 \u2192 3", "3 \u2192 1"}
    table = found.table[(found.table.source_layer == 2) & (found.table.target_layer == 0)]
    for turn, column in (("clicked", "score"), ("selected", "overlap")):
        numbers = table.set_index(["source_expert", "target_expert"])[column]
        assert len(seen[turn]) == len(numbers) == EXPERTS**2
        for layers, source, target, text in seen[turn]:
            assert layers == "2 \u2192 0"
            expected = numbers.loc[source, target]
            if math.isnan(expected):
                assert not re.search(r"\d", text or "")
            else:
                assert float(text.replace("\u2212", "-")) == pytest.approx(expected, rel=0.01)
