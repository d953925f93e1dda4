from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import ttest_ind
from sklearn.linear_model import RidgeCV
from sklearn.metrics import adjusted_rand_score

import clusters_zoo
import models_zoo
import moescope
from interventions_zoo import BUILDERS
from moescope.alignment.randomness import generator
from moescope.analyses.clusters.analysis import clustered, clusters
from moescope.analyses.clusters.merging import affordable, mean_outputs, merged_experts
from moescope.analyses.clusters.options import ClustersOptions
from moescope.analyses.clusters.sharing import (
    DEPTH,
    LINEAR,
    MEAN,
    MERGED,
    RANDOM,
    WITHIN,
    Setting,
    sizes,
    smaller_models,
)
from moescope.analyses.clusters.stability import (
    OTHER_DOCUMENTS,
    OTHER_SEED,
    drawn_evenly,
    halves,
    stability_table,
)
from moescope.analyses.clusters.tree import (
    apart,
    best_cut,
    cuts,
    dealt_out,
    labels_of,
    representatives,
    silhouettes,
    tree_of,
)
from moescope.analyses.fits import Source
from moescope.analyses.likeness import Likeness, distances_of, null_fvu, tokens_by_expert
from moescope.analyses.likeness_options import chosen_experts
from moescope.analyses.loss_tables import against_table, judged
from moescope.errors import CaptureError, ModelError, OptionError
from moescope.evaluate.totals import Resampling
from moescope.models.load import load
from moescope.reports.registry import chapter

OPTIONS = ClustersOptions(
    layers=(2, 3, 4), kept=(8, 5), stability_experts=0, permutations=20, random=2, bootstrap=100
)


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """The experts of layer 4 are copies of those of layer 2; those of layer 3 are like none."""
    model = clusters_zoo.with_copies([4], of=2)
    return clusters_zoo.material(model, tmp_path_factory.mktemp("copies"))


@pytest.fixture(scope="module")
def fits(material):
    return clusters_zoo.exact(material, OPTIONS)


@pytest.fixture(scope="module")
def result(fits):
    return clustered(fits, OPTIONS)


def of(table, **wanted):
    for name, value in wanted.items():
        table = table[table[name] == value]
    return table


def test_copies_are_clustered_with_what_they_copy(fits):
    likeness = Likeness.of(fits, chosen_experts(fits.material.model, OPTIONS))
    copies = [i for i, expert in enumerate(likeness.experts) if expert.layer in (2, 4)]
    truth = [likeness.experts[i].expert for i in copies]
    labels = labels_of(tree_of(likeness.distances), 8)
    assert adjusted_rand_score(truth, labels[copies]) == 1
    assert len(set(labels)) == 8
    others = [label for i, label in enumerate(labels) if i not in copies]
    assert len(set(others)) == len(others) == 4
    for i in copies:
        twin = Source(6 - likeness.experts[i].layer, likeness.experts[i].expert)
        assert likeness.distances[i, likeness.experts.index(twin)] == pytest.approx(0, abs=1e-9)


def test_sharing_copies_over_all_layers_costs_nothing_and_other_ways_do_not(result):
    shared = of(result.tables["shared"], domain="all", kept=8).set_index("variant")
    assert abs(shared.loc[DEPTH].difference) < 1e-7
    assert shared.loc[DEPTH].difference_high < 1e-6
    for variant in (WITHIN, MERGED, LINEAR, MEAN):
        assert abs(shared.loc[variant].difference) > 1e-3
    cut = of(result.table, clusters=8).iloc[0]
    assert (cut.could_go, cut.better_than_linear) == (4, 4)
    assert cut.fvu_worst == pytest.approx(0, abs=1e-9)
    members = result.tables["members"]
    copied = members.layer.isin([2, 4])
    assert (members[copied].nearest_fvu < 1e-9).all()
    assert (members[~copied].nearest_fvu > 1).all()
    said = result.findings[0].text
    assert said.startswith("Of 12 experts, 8 are imitated by their most similar expert")


def test_parameters_are_counted_with_what_stands_in(result, fits):
    shared = of(result.tables["shared"], domain="all", kept=8).set_index("variant")
    each, hidden = 3 * models_zoo.HIDDEN * 16, models_zoo.HIDDEN
    assert shared.loc[DEPTH].parameters == 8 * each  # identities have no parameters
    assert shared.loc[MERGED].experts == 8
    assert shared.loc[LINEAR].parameters == 8 * each + 4 * hidden * (hidden + 1)
    assert shared.loc[MEAN].parameters == 8 * each + 4 * hidden
    assert shared.loc[DEPTH].of_parameters == pytest.approx(8 / 12)


def test_comparisons_are_differences_of_the_losses(result):
    shared = of(result.tables["shared"], domain="all")
    for row in result.tables["against"].itertuples():
        own = of(shared, variant=DEPTH, kept=row.kept).loss.iloc[0]
        other = of(shared, variant=row.versus, kept=row.kept).loss
        assert row.difference == pytest.approx(own - other.mean())
        assert row.draws == len(other) == (2 if row.versus == RANDOM else 1)


def test_a_model_of_copies_has_stable_clusters(tmp_path):
    model = clusters_zoo.with_copies([1], of=0, count=2)
    options = ClustersOptions(kept=(4,), stability_experts=8, permutations=20, random=2)
    given = clusters_zoo.material(model, tmp_path)
    found = clustered(clusters_zoo.exact(given, options), options)
    assert of(found.table, best=True).clusters.item() == 4
    own = of(found.tables["stability"], comparison=OTHER_DOCUMENTS, chosen=True)
    assert (own.ari.item(), own.clusters.item(), own.n_experts.item()) == (1, 4, 8)
    said = " ".join(finding.text for finding in found.findings)
    assert "The clusters are stable, and more so than those of random experts in any draw." in said
    assert "Some experts are thus more alike than that explains." in said
    for figure in chapter("clusters").draw(found):
        assert figure.title.endswith("?")
        assert figure.specification()["datasets"]


def test_independent_random_experts_are_not_said_to_have_clusters(tmp_path):
    model = clusters_zoo.with_copies([], of=0, count=2)
    options = ClustersOptions(kept=(6,), stability_experts=8, permutations=20, random=2)
    given = clusters_zoo.material(model, tmp_path)
    found = clustered(clusters_zoo.exact(given, options), options)
    said = " ".join(finding.text for finding in found.findings)
    assert "Stable clusters are not shown" in said
    assert "Of 8 experts, 0 are imitated" in said


def test_the_null_is_the_error_of_a_linear_map_on_inner_tokens(fits):
    source = Source(0, 1)
    train, _ = fits.samples(source)
    rest, inner = train.split(0.15, generator(0, "L0E1", "inner tokens"))
    ridge = RidgeCV(alphas=np.logspace(-3, 3, 13)).fit(rest.inputs, rest.outputs)
    missed = ridge.predict(inner.inputs) - inner.outputs.numpy()
    spread = inner.outputs - rest.outputs.mean(0)
    reference = np.square(missed).sum() / spread.square().sum().item()
    assert null_fvu(fits, source) == pytest.approx(reference, rel=0.05)


def test_relative_errors_and_distances():
    inner = np.array([[0, 0.2, 0.9], [0.3, 0, 0.6], [0.5, 0.5, 0]])
    experts = [Source(0, 0), Source(0, 1), Source(1, 0)]
    likeness = Likeness(
        experts=experts,
        left_out=[],
        inner_fvu=inner,
        fvu=inner,
        null=np.array([0.4, 1.0, 0.5]),
        linear_fvu=np.ones(3),
    )
    expected = [[0, 0.5, 2.25], [0.5, 0, 1], [2.25, 1, 0]]
    np.testing.assert_allclose(likeness.distances, expected)
    part = likeness.part([experts[2], experts[0]])
    np.testing.assert_allclose(part.distances, [[0, 2.25], [2.25, 0]])


def test_trees_are_cut_into_exactly_so_many_also_where_distances_are_equal():
    positions = np.array([0.0, 0.0, 0.0, 5.0, 5.0, 9.0])
    distances = np.abs(np.subtract.outer(positions, positions))
    tree = tree_of(distances)
    for number in cuts(6):
        assert len(set(labels_of(tree, number))) == number
    assert best_cut(distances) == 3
    assert silhouettes(distances)[cuts(6).index(3)] == pytest.approx(5 / 6)  # one is alone
    labels = labels_of(tree, 3)
    assert adjusted_rand_score([0, 0, 0, 1, 1, 2], labels) == 1


def test_errors_dealt_out_keep_how_easy_each_expert_is_and_how_well_it_imitates():
    random = np.random.default_rng(0)
    easy, good = random.uniform(1, 2, size=(6, 1)), random.uniform(0, 1, size=6)
    relative = np.where(np.eye(6, dtype=bool), 0, easy + good)
    np.testing.assert_allclose(dealt_out(relative, random), distances_of(relative))
    relative[0, 3] = relative[3, 0] = 0.1
    dealt = [dealt_out(relative, random)[0, 3] for _ in range(60)]
    assert np.mean(np.array(dealt) < 0.5) < 0.2


def test_a_cluster_keeps_who_imitates_the_others_best():
    relative = np.array([[0, 1, 5, 0], [3, 0, 5, 0], [1, 2, 0, 0], [9, 9, 9, 0.0]])
    kept = representatives(np.array([0, 0, 0, 1]), relative)
    assert kept.tolist() == [1, 1, 1, 3]  # sums of columns 0 to 2: 4, 3, 10


def test_groups_that_are_held_apart_do_not_mix():
    random = np.random.default_rng(0)
    points = random.normal(size=(12, 2))
    distances = np.linalg.norm(points[:, None] - points, axis=2)
    groups = [0, 1, 2] * 4
    for number in range(3, 12):
        labels = labels_of(tree_of(apart(distances, groups)), number)
        for cluster in set(labels):
            assert len({g for g, la in zip(groups, labels, strict=True) if la == cluster}) == 1


def test_halves_share_no_training_document_and_no_held_out_one_trains(fits):
    first, second = halves(fits.tokens)
    trained = ~first.held_out, ~second.held_out
    assert not (trained[0] & trained[1]).any()
    assert torch.equal(trained[0] | trained[1], ~fits.tokens.held_out)
    assert 0.35 < trained[0].sum() / (~fits.tokens.held_out).sum() < 0.65


def test_experts_are_drawn_evenly_from_the_layers():
    experts = [Source(layer, expert) for layer in (0, 2, 5) for expert in range(4)]
    drawn = drawn_evenly(experts, 7, seed=0)
    assert drawn == sorted(drawn)
    assert sorted(sum(e.layer == layer for e in drawn) for layer in (0, 2, 5)) == [2, 2, 3]
    assert drawn_evenly(experts, 99, seed=0) == experts


def test_experts_that_give_back_what_they_get_take_no_part():
    model = load(BUILDERS["longcat_flash"]())
    chosen = chosen_experts(model, ClustersOptions(experts_per_layer=3))
    assert all(model.layer(e.layer).expert_tensors(e.expert) for e in chosen)
    assert len(chosen) == 3 * len(model.layers)
    every = chosen_experts(model, ClustersOptions())
    assert 0 < len(every) < sum(layer.num_experts for layer in model.layers)


def test_tokens_are_counted_by_document(fits):
    capture, held_out = fits.tokens.capture, fits.tokens.held_out
    routing = capture.routing(2)
    own = held_out[capture.documents]
    for part in (False, True):
        used = routing.experts[own == part]
        found = tokens_by_expert(fits.tokens, [Source(2, 3)], held_out=part)
        assert found == {Source(2, 3): int((used == 3).sum())}


def test_merging_takes_the_nearest_mean_outputs_and_weighs_by_use(fits):
    experts = [Source(0, expert) for expert in range(4)]
    means = mean_outputs(fits, experts)
    layer, capture = fits.material.model.layer(0), fits.tokens.capture
    recorded = capture.inputs(0)
    own = ~fits.tokens.held_out[capture.documents[recorded.tokens]]
    reference = layer.expert_outputs(recorded.values[own].float(), [1])[0].mean(0)
    torch.testing.assert_close(means[1], reference.detach(), atol=1e-4, rtol=1e-3)
    distances = torch.cdist(means, means) + 1e9 * torch.eye(4)
    a, b = divmod(int(distances.argmin()), 4)
    merged = merged_experts(fits, experts, {0: 3})
    assert set(merged) == {Source(0, a), Source(0, b)}
    used = tokens_by_expert(fits.tokens, experts, held_out=False)
    share = used[Source(0, a)] / (used[Source(0, a)] + used[Source(0, b)])
    up = share * layer.expert_weights(a).up + (1 - share) * layer.expert_weights(b).up
    torch.testing.assert_close(merged[Source(0, a)].up, up.detach())
    assert merged_experts(fits, experts, {0: 4}) == {}


def test_merging_keeps_as_many_as_the_parameters_pay_for_where_layers_have_them(fits):
    model, each = fits.material.model, 3 * models_zoo.HIDDEN * 16
    experts = [Source(0, 0), *(Source(1, e) for e in range(4)), *(Source(2, e) for e in range(4))]
    assert affordable(model, experts, 9 * each) == {0: 1, 1: 4, 2: 4}
    assert affordable(model, experts, 7 * each - 1) == {0: 1, 1: 3, 2: 2}
    assert affordable(model, experts, 3 * each) == {0: 1, 1: 1, 2: 1}
    assert affordable(model, experts, 3 * each - 1) == {}


def test_verdicts_are_corrected():
    table = pd.DataFrame(
        {"difference": [-1, 1, -1, 2], "p_value": [0.01, 0.04, np.nan, 0.015]}, dtype=float
    )
    found = judged(table)
    np.testing.assert_allclose(found.p_corrected, [0.03, 0.04, np.nan, 0.03])
    assert found.verdict.tolist() == ["lower", "higher", "", "higher"]
    assert judged(table.assign(p_value=0.02)).verdict.tolist() == ["open"] * 4


def test_random_choices_are_compared_over_documents_and_over_draws():
    random = np.random.default_rng(0)
    tokens = random.integers(50, 200, size=40)

    def documents(mean):
        loss = tokens * (mean + 0.01 * random.normal(size=40))
        return pd.DataFrame({"tokens": tokens, "loss": loss})

    sums = {("own", 5): documents(1.0), ("one", 5): documents(1.2), ("own", 9): documents(0.0)}
    rises = {draw: documents(mean) for draw, mean in enumerate((1.1, 1.5, 0.95))}
    sums |= {("random", 5, draw): frame for draw, frame in rises.items()}
    resampling = Resampling(resamples=200, seed=0)
    found = against_table(sums, [("own", 5)], "kept", resampling).set_index("versus")
    assert found.verdict.to_dict() == {"one": "lower", "random": "open"}
    own = sums["own", 5].loss
    each = np.array([(own - frame.loss).sum() / tokens.sum() for frame in rises.values()])
    row = found.loc["random"]
    assert row.draws == 3
    assert (row.least, row.most) == pytest.approx((each.min(), each.max()))
    assert row.difference == pytest.approx(each.mean())
    # As if the setting were one more draw; documents are all alike.
    assert row.p_value == pytest.approx(ttest_ind([0.0], each).pvalue, rel=1e-3)
    reach = 4.302653 * each.std(ddof=1) * (1 + 1 / 3) ** 0.5  # t, two degrees of freedom
    assert row.difference_high - row.difference == pytest.approx(reach, rel=1e-3)
    assert found.loc["one"].p_value < 1e-6


def test_it_runs_on_fitted_adapters_of_chosen_experts_and_goes_on_from_them(material, monkeypatch):
    options = {
        "layers": (2, 4),
        "experts_per_layer": 2,
        "form": "scale",
        "steps": 40,
        "kept": (2,),
        "stability_experts": 0,
        "random": 2,
        "permutations": 20,
        "bootstrap": 50,
    }
    given = {"model": material.model, "corpus": clusters_zoo.corpus(160)}
    found = clusters(material.run, **given, **options)
    assert set(found.tables["members"].layer) == {2, 4}
    assert len(found.tables["members"]) == 4
    assert "was not measured" in " ".join(f.text for f in found.findings)
    for figure in chapter("clusters").draw(found):
        assert figure.specification()["datasets"]
    saved = moescope.Run(material.run).result("clusters")
    pd.testing.assert_frame_equal(saved.table, found.table)

    def refuse(*_, **__):
        raise AssertionError("fitted again")

    monkeypatch.setattr("moescope.analyses.fits.fit_pairs", refuse)
    again = clusters(material.run, **given, **options)
    pd.testing.assert_frame_equal(again.tables["shared"], found.tables["shared"])


def test_random_clusters_of_a_size_do_not_depend_on_what_else_is_asked(fits):
    likeness = Likeness.of(fits, chosen_experts(fits.material.model, OPTIONS))
    every, one = (
        smaller_models(fits, likeness, replace(OPTIONS, kept=kept)) for kept in ((8, 5), (5,))
    )
    seen = []
    for models in (every, one):
        with models[Setting(RANDOM, 5, 1)].change():
            seen.append(fits.material.model.forward(torch.arange(3, 40)[None], head=True)[0])
    torch.testing.assert_close(*seen)
    assert set(one) <= set(every)


def test_a_half_with_too_few_tokens_costs_no_other_comparison(fits):
    likeness = Likeness.of(fits, chosen_experts(fits.material.model, OPTIONS))
    short = halves(fits.tokens)[0].held_out

    class Starved(clusters_zoo.Exact):
        def between(self, source, targets):
            found = super().between(source, targets)
            if not torch.equal(self.tokens.held_out, short):
                return found
            return {t: replace(each, inner_fvu=float("nan")) for t, each in found.items()}

    starved = Starved(**{n: getattr(fits, n) for n in ("material", "tokens", "options")})
    table = stability_table(starved, likeness, replace(OPTIONS, stability_experts=8))
    assert set(table["comparison"]) == {OTHER_SEED}


def test_experts_without_tokens_are_left_out(material):
    starved = Source(0, 0)

    class Starved(clusters_zoo.Exact):
        def between(self, source, targets):
            found = super().between(source, targets)
            for fitted in found.values():
                if source == starved:
                    object.__setattr__(fitted, "inner_fvu", float("nan"))
            return found

    fits = clusters_zoo.exact(material, OPTIONS)
    fits = Starved(**{n: getattr(fits, n) for n in ("material", "tokens", "options")})
    experts = [Source(0, expert) for expert in range(4)] + [Source(1, 0)]
    likeness = Likeness.of(fits, experts)
    assert likeness.left_out == [starved]
    assert likeness.experts == experts[1:]
    assert likeness.inner_fvu.shape == (4, 4)
    with pytest.raises(CaptureError, match="too few experts have tokens"):
        Likeness.of(fits, experts[:4])
    with pytest.raises(OptionError, match="too few experts take part"):
        Likeness.of(fits, experts[1:4])


def test_encoder_decoder_models_are_refused(tmp_path):
    given = clusters_zoo.material(load(models_zoo.build("mixtral")), tmp_path, documents=20)
    given.model.model.config.is_encoder_decoder = True
    with pytest.raises(ModelError, match="encoder-decoder"):
        clusters.compute(given, OPTIONS)


def test_sizes_leave_some_out():
    assert sizes(20, ClustersOptions(shares=(0.5, 0.99))) == [19, 10]
    assert sizes(20, ClustersOptions(kept=(5, 50))) == [19, 5]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"random": 6}, "random"),
        ({"random": 1}, "random"),
        ({"shares": (1.0,)}, "share"),
        ({"shares": ()}, "no sizes"),
        ({"kept": (4, 0)}, "too few experts kept"),
        ({"stability_experts": 2}, "too few"),
        ({"held_out_share": 0.0}, "held_out_share"),
    ],
)
def test_options_that_say_nothing_are_refused(options, said):
    with pytest.raises(OptionError, match=said):
        ClustersOptions(**options)
