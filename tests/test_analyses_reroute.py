import numpy as np
import pandas as pd
import pytest
import torch

import clusters_zoo
import models_zoo
import moescope
from moescope.analyses.fits import Source
from moescope.analyses.likeness import Likeness, tokens_by_expert
from moescope.analyses.likeness_options import chosen_experts
from moescope.analyses.losses import Losses, entered
from moescope.analyses.reroute.analysis import reroute, rerouted
from moescope.analyses.reroute.findings import findings
from moescope.analyses.reroute.options import RerouteOptions
from moescope.analyses.reroute.residents import resident_numbers, residents
from moescope.analyses.reroute.ways import (
    ANY_LAYER,
    LINEAR,
    MEAN,
    RANDOM,
    ROUTER,
    SAME_LAYER,
    SKIPPED,
    ways,
)
from moescope.errors import ModelError, OptionError
from moescope.evaluate.paired import compare
from moescope.interventions import replace_output
from moescope.models.load import load
from moescope.models.observe import observe
from moescope.reports.registry import chapter

EACH = 3 * models_zoo.HIDDEN * 16
"""Parameters of an expert."""


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """All three layers have the same four experts, and routers of their own."""
    model = clusters_zoo.with_copies([1, 2], of=0, count=3)
    return clusters_zoo.material(model, tmp_path_factory.mktemp("copies"))


@pytest.fixture(scope="module")
def matching(material):
    """The least number of most used experts among which each of the four functions is."""
    fits = clusters_zoo.exact(material, RerouteOptions())
    used = tokens_by_expert(
        fits.tokens, chosen_experts(material.model, RerouteOptions()), held_out=False
    )
    return next(n for n in range(4, 12) if len({e.expert for e in residents(used, n)}) == 4)


@pytest.fixture(scope="module")
def options(matching):
    budgets = (matching / 12, 2 / 12)
    return RerouteOptions(budgets=budgets, thresholds=(1.0, 3.0), random=2, bootstrap=100)


@pytest.fixture(scope="module")
def result(material, options):
    return rerouted(clusters_zoo.exact(material, options), options)


def of(table, **wanted):
    for name, value in wanted.items():
        table = table[table[name] == value]
    return table


def test_rerouting_at_the_matching_budget_costs_nothing(result, matching):
    assert matching < 12
    rows = of(result.table, domain="all", resident=matching)
    own = of(rows, way=ANY_LAYER, threshold=1.0).iloc[0]
    assert abs(own.difference) < 1e-6
    assert own.skipped == 0
    assert own.rerouted > 0
    for way in (SAME_LAYER, RANDOM, SKIPPED, ROUTER, LINEAR, MEAN):
        assert (of(rows, way=way).difference.abs() > 1e-3).all()
    routes = of(result.tables["routes"], resident=matching)
    assert (routes.expert == routes.to_expert).all()
    assert (routes.layer != routes.to_layer).all()
    assert len(routes) == 12 - matching
    assert "0% stay within their layer" in result.findings[-1].text


def test_below_it_what_has_no_copy_at_hand_is_skipped_by_the_threshold(result, material, options):
    fits = clusters_zoo.exact(material, options)
    learned = tokens_by_expert(fits.tokens, chosen_experts(material.model, options), held_out=False)
    at_hand = {expert.expert for expert in residents(learned, 2)}
    routes = of(result.tables["routes"], resident=2)
    assert set(routes.expert) == at_hand
    assert (routes.inner_fvu < 1e-9).all()
    used = tokens_by_expert(fits.tokens, list(learned), held_out=True)
    absent = set(learned) - set(residents(learned, 2))
    slots = sum(used.values())
    own = of(result.table, domain="all", resident=2, way=ANY_LAYER, threshold=1.0).iloc[0]
    near = sum(used[expert] for expert in absent if expert.expert in at_hand)
    far = sum(used[expert] for expert in absent if expert.expert not in at_hand)
    assert own.rerouted == pytest.approx(near / slots)
    assert own.skipped == pytest.approx(far / slots)
    assert own.rerouted + own.skipped < 1
    loose = of(result.table, domain="all", resident=2, way=ANY_LAYER, threshold=3.0).iloc[0]
    assert loose.skipped < own.skipped


def test_the_first_threshold_holds_for_all_routes_that_are_compared(material, options):
    fits = clusters_zoo.exact(material, options)
    likeness = Likeness.of(fits, chosen_experts(material.model, options))
    used = tokens_by_expert(fits.tokens, likeness.experts, held_out=False)
    index = {expert: i for i, expert in enumerate(likeness.experts)}
    same = {ANY_LAYER: [], SAME_LAYER: [], RANDOM: []}
    for setting, way in ways(fits, likeness, used, options).items():
        for source, target in way.routes.items():
            same[setting.way].append(target.layer == source.layer)
            assert likeness.inner_fvu[index[source], index[target]] <= setting.threshold
        assert (setting.threshold == 1.0) or setting.way not in (SAME_LAYER, RANDOM)
    assert any(same[ANY_LAYER])  # at the looser threshold
    assert same[SAME_LAYER] == []  # no two experts of a layer are alike
    assert same[RANDOM]


def test_losses_are_those_that_compare_finds(material, options):
    fits = clusters_zoo.exact(material, options)
    likeness = Likeness.of(fits, chosen_experts(material.model, options))
    used = tokens_by_expert(fits.tokens, likeness.experts, held_out=False)
    tried = ways(fits, likeness, used, options)
    setting = next(s for s in tried if s[:2] == (SKIPPED, 2))
    losses = Losses.held_out(fits, 200_000, "reroute", options.behind_losses)
    found = losses.of("skipped", tried[setting].change)
    skipped = [(material.model.layer(e.layer), e.expert) for e in tried[setting].skipped]
    assert len(skipped) == 10

    def zeros():
        return entered([replace_output(expert, 0.0) for expert in skipped])

    table = compare(
        material.model,
        material.text(200_000),
        {"zeros": zeros},
        documents=fits.tokens.held_out,
        bootstrap=10,
    )
    expected = of(table, intervention="zeros", domain="all").iloc[0]
    assert found.difference.sum() / found.tokens.sum() == pytest.approx(expected.difference)
    assert found.tokens.sum() == expected.n_tokens


def test_parameters_of_what_stands_in_are_counted(result, matching):
    rows = of(result.table, domain="all", resident=matching).set_index("way")
    away = 12 - matching
    hidden = models_zoo.HIDDEN
    assert (rows.saved_parameters == away * EACH).all()
    assert (rows.loc[SKIPPED].extra_parameters, rows.loc[ROUTER].extra_parameters) == (0, 0)
    assert rows.loc[LINEAR].extra_parameters == away * hidden * (hidden + 1)
    assert rows.loc[MEAN].extra_parameters == away * hidden
    expected = (matching * EACH + away * hidden) / (12 * EACH)
    assert rows.loc[MEAN].of_parameters == pytest.approx(expected)


def test_the_router_chooses_among_residents_as_far_as_they_are_enough(material, options):
    fits = clusters_zoo.exact(material, options)
    likeness = Likeness.of(fits, chosen_experts(material.model, options))
    used = {expert: 100 - i for i, expert in enumerate(likeness.experts)}  # layer 0 most
    tried = ways(fits, likeness, used, RerouteOptions(budgets=(5 / 12,), random=2))
    way = next(way for setting, way in tried.items() if setting.way == ROUTER)
    # Layer 1 keeps expert 0 and, since two are chosen, the most used of the others, which is mute.
    assert set(way.skipped) == {Source(1, 1), Source(2, 0), Source(2, 1)}
    assert set(way.rerouted) == {Source(la, e) for la in (1, 2) for e in (2, 3)}
    seen = []
    ids = torch.arange(3, 60)[None]
    with way.change(), observe(material.model.layers, seen.append):
        material.model.forward(ids)
    assert set(seen[1].routing.experts.unique().tolist()) <= {0, 1}


def test_comparisons_are_differences_of_the_losses(result):
    rows = of(result.table, domain="all")
    for row in result.tables["against"].itertuples():
        own = of(rows, way=ANY_LAYER, threshold=1.0, resident=row.resident).loss.iloc[0]
        other = of(rows, way=row.versus, resident=row.resident).loss
        assert row.difference == pytest.approx(own - other.mean())
        assert row.draws == len(other)


def test_the_most_used_are_resident_and_the_first_of_equal_ones():
    used = {Source(0, 0): 5, Source(0, 1): 9, Source(1, 0): 5, Source(1, 1): 1}
    assert residents(used, 2) == [Source(0, 0), Source(0, 1)]
    assert residents(used, 3) == [Source(0, 0), Source(0, 1), Source(1, 0)]
    assert resident_numbers(4, (0.5, 0.99, 0.01)) == [3, 2, 1]


def test_figures(result):
    drawn = chapter("reroute").draw(result)
    assert [figure.name for figure in drawn] == ["reroute-loss", "reroute-against"]
    for figure in drawn:
        assert figure.title.endswith("?")
        assert figure.specification()["datasets"]


def test_findings_give_no_verdict_without_intervals(result):
    against = result.tables["against"].assign(difference_low=np.nan)
    said = findings(result.tables | {"against": against}, 1.0, [Source(0, 1)])
    assert any("cannot be said: under 30 held-out documents" in f.text for f in said)
    assert said[-1].text.endswith("have too few tokens for adapters and stay: L0E1.")


def test_it_runs_on_fitted_adapters_and_is_saved(material):
    chosen = {"experts_per_layer": 2, "layers": (0, 2), "form": "scale", "steps": 40}
    found = reroute(
        material.run,
        model=material.model,
        corpus=clusters_zoo.corpus(160),
        budgets=(0.5,),
        random=2,
        bootstrap=50,
        **chosen,
    )
    saved = moescope.Run(material.run).result("reroute")
    pd.testing.assert_frame_equal(saved.table, found.table)
    own = of(found.table, way=ANY_LAYER, threshold=1.0, domain="all").iloc[0]
    assert own.extra_parameters == len(found.tables["routes"]) * 2 * models_zoo.HIDDEN
    assert own.of_experts == 0.5


def test_encoder_decoder_models_are_refused(tmp_path):
    given = clusters_zoo.material(load(models_zoo.build("mixtral")), tmp_path, documents=20)
    given.model.model.config.is_encoder_decoder = True
    with pytest.raises(ModelError, match="encoder-decoder"):
        reroute.compute(given, RerouteOptions())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"budgets": ()}, "budgets"),
        ({"thresholds": ()}, "thresholds"),
        ({"budgets": (1.0,)}, "share"),
        ({"tokens": 0}, "tokens"),
        ({"thresholds": (1.0, float("nan"))}, "threshold"),
        ({"thresholds": (-0.5,)}, "threshold"),
        ({"bootstrap": 0}, "bootstrap"),
    ],
)
def test_options_that_say_nothing_are_refused(options, said):
    with pytest.raises(OptionError, match=said):
        RerouteOptions(**options)
