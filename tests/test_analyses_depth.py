import dataclasses
import itertools

import numpy as np
import pandas as pd
import pytest
from scipy.stats import kendalltau

import moescope
from moescope.analyses.curves import Curve
from moescope.analyses.depth.analysis import DepthOptions, depth, layer_curves
from moescope.analyses.depth.trends import findings, trend_table
from moescope.analyses.material import Material
from moescope.errors import MoEScopeError
from moescope.reports.registry import chapter
from moescope.runs import Result, Run
from results_zoo import curve, routing_result


def test_a_rising_curve_has_the_rarest_order():
    row = trend_table(curve([1, 2, 4, 8, 9, 20])).iloc[0]
    assert row.tau == pytest.approx(1)
    assert row.p_value == pytest.approx(2 / 720)
    assert row.last_outside
    assert (row["first"], row["last"]) == (1, 20)


def test_the_last_layer_is_told_apart():
    row = trend_table(curve([5, 4, 3, 2, 1, 9])).iloc[0]
    assert row.tau_without_last == pytest.approx(-1)
    assert row.last_outside
    assert row.tau == pytest.approx(kendalltau(range(6), [5, 4, 3, 2, 1, 9]).statistic)


def test_p_is_exact_over_all_orders():
    taus = [
        abs(kendalltau(range(5), order).statistic) for order in itertools.permutations(range(5))
    ]
    values = [2, 0, 1, 4, 3]
    expected = np.mean(np.array(taus) >= abs(kendalltau(range(5), values).statistic) - 1e-9)
    assert trend_table(curve(values)).p_value[0] == pytest.approx(expected)


def test_chance_is_rejected_no_more_than_it_may_be():
    random = np.random.default_rng(0)
    p = [trend_table(curve(random.normal(size=7))).p_value[0] for _ in range(300)]
    assert np.mean(np.array(p) <= 0.1) <= 0.1 + 3 * np.sqrt(0.1 * 0.9 / 300)


def test_rounding_is_no_trend():
    row = trend_table(curve([1 - 1e-8 * layer for layer in range(8)])).iloc[0]
    assert (row.tau, row.p_value) == (0, 1)


def test_few_layers_have_no_p_value():
    table = trend_table(pd.concat([curve([1, 2, 3]), curve([1, 2, 3, 4, 5], measure="n")]))
    assert table.status.tolist() == ["few_layers", "ok"]
    assert table.p_corrected[1] == table.p_value[1]
    assert "No trend" in findings(table[:1])[0].text


def test_findings_name_only_what_stands_the_correction():
    noise = [curve([0, 3, 1, 4, 2, 5], measure=f"noise {n}") for n in range(20)]
    steep = curve(range(9), measure="steep")
    said = findings(trend_table(pd.concat([*noise, steep])))
    assert said[0].numbers == {"curves": 21, "trends": 1}
    assert said[1].text.startswith("steep (a, decoder) rises from 0 to 8")


def test_a_curve_reads_its_rows_and_limits():
    table = pd.DataFrame(
        {
            "layer": [3, 3, 5],
            "domain": ["all", "x", "all"],
            "share": [0.1, 0.9, 0.2],
            "share_low": [0.0, 0.8, 0.1],
            "share_high": [0.2, 1.0, 0.3],
            "n_tokens": [7, 1, 7],
        }
    )
    wanted = Curve(
        measure="a share",
        table="t",
        value="share",
        limits=("share_low", "share_high"),
        where={"domain": "all"},
    )
    found = wanted.read(Result(name="r", tables={"t": table}))
    assert found.layer.tolist() == [3, 5]
    assert found.value.tolist() == [0.1, 0.2]
    assert found.low.tolist() == [0.0, 0.1]
    assert found.high.tolist() == [0.2, 0.3]
    assert found.n_tokens.tolist() == [7, 7]
    assert found.n_documents.isna().all()
    assert wanted.read(Result(name="r", tables={})).empty
    earlier = Result(name="r", tables={"t": table.drop(columns="domain")})
    assert wanted.read(earlier).empty


@pytest.fixture
def run(tmp_path):
    routing_result(layers=6).save(Run(tmp_path).results_folder)
    return Run(tmp_path)


def test_curves_of_a_run_come_from_its_results(run):
    curves = layer_curves(run)
    entropy = curves[curves.measure == "mean entropy of the router (bits)"]
    assert entropy.layer.tolist() == [0, 1, 2, 3, 4, 5]
    assert entropy["last"].tolist() == [False] * 5 + [True]
    expected = run.result("routing").tables["layers"]["router_entropy_bits"]
    assert entropy.value.tolist() == expected.tolist()


def test_it_is_done_until_a_result_changes(run):
    material, options = Material(run), DepthOptions()
    result = depth.run(material, options)
    assert depth.is_done(material, options)
    (figure,) = chapter("depth").draw(result)
    assert figure.specification()["facet"]
    routed = routing_result(layers=6)
    changed = {**routed.provenance, "options": {"seed": 1}}
    dataclasses.replace(routed, provenance=changed).save(run.results_folder)
    assert not depth.is_done(material, options)


def test_a_run_without_measures_of_layers_is_refused(tmp_path):
    with pytest.raises(MoEScopeError, match="no measure of layers"):
        depth.compute(Material(tmp_path), DepthOptions())


def test_is_public():
    assert moescope.depth is depth
