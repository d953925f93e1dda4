"""What is said of several pairs of layers, and that it is what the tables hold."""

import numpy as np
import pandas as pd
import pytest

from moescope.analyses.align.findings import findings
from moescope.analyses.align.layers import by_layers
from results_zoo import align_result as of_chance

TWO = ((0, 1), (4, 5))


def align_result(**about):
    result = of_chance(**about)
    result.table["underdetermined"] = False
    return result


def said(tables, words):
    (finding,) = [f for f in findings(tables) if words in f.text]
    return finding


def scored(layer_pairs=TWO, experts=8):
    table = align_result(experts=experts, layer_pairs=layer_pairs).table
    return table[table.status == "ok"].reset_index(drop=True)


def test_intervals_above_zero_are_counted_by_pair_of_layers():
    table = scored()
    table["score_low"] = -0.1
    table.loc[table.index[table.source_layer == 4][:3], "score_low"] = 0.1
    finding = said({"align": table}, "lies above zero")
    tested = len(table) // 2
    assert finding.numbers["above_zero"] == 3
    assert f"4 \u2192 5 3 of {tested}, none in 1 pair of layers" in finding.text
    assert f"at most about {0.025 * len(table):.1f}" in finding.text
    best = table.loc[table.score.idxmax()]
    assert f"of layer {best.source_layer} imitated by expert {best.target_expert}" in finding.text


def test_one_pair_of_layers_reads_as_before():
    table = scored(((1, 2),))
    text = findings({"align": table})[0].text
    assert text.startswith(f"Of {len(table)} pairs of experts (layer 1 imitated by layer 2), ")
    assert "By pair of layers" not in " ".join(f.text for f in findings({"align": table}))


def test_controls_are_compared_within_pairs_of_layers():
    table = scored()
    deep = table.source_layer == 4
    table["fvu_random"] = 0.5
    table["fvu"] = np.where(deep, 0.4, 0.6)
    table["fvu_linear"] = np.where(deep, 0.1, 0.2)
    finding = said({"align": table}, "A linear map without any expert")
    assert finding.numbers["layers_below_linear"] == 0
    assert finding.numbers["layers_below_random"] == 1
    assert "of the linear map in 0 of 2, below that of random experts in 1." in finding.text


def test_the_size_of_the_outputs_is_compared_within_pairs_of_layers():
    """Pooled over layers the published error would follow the variance; within each it does not."""
    table = scored()
    deep = (table.source_layer == 4).to_numpy()
    variance = 1.0 + table.source_expert + 100 * deep
    table["fvu"] = 0.5
    table["mse_mean"] = 0.5 * variance
    table["published_mse"] = 20.0 - table.source_expert + 100 * deep
    assert table.published_mse.corr(variance, method="spearman") > 0.3
    finding = said({"align": table}, "published protocol's number")
    assert finding.numbers["lowest_spearman"] == pytest.approx(-1)
    assert finding.numbers["highest_spearman"] == pytest.approx(-1)
    assert "between -1.00 and -1.00 in 2 pairs of layers" in finding.text
    np.testing.assert_allclose(by_layers(table).size_correlation, -1)


def test_few_imitated_experts_have_no_correlation():
    table = scored(experts=5)  # the last has no numbers
    finding = said({"align": table}, "published protocol's number")
    assert "correlation" not in finding.text
    assert by_layers(table).size_correlation.isna().all()


def test_what_an_adapter_costs():
    finding = said({"align": scored()}, "An adapter holds")
    assert "holds 16,768 numbers, 45.5% of the 36,864 of an expert" in finding.text
    table = scored()
    table.loc[0, ["adapter_parameters", "parameters_share"]] = [1_024, 1_024 / 36_864]
    assert "1,024 to 16,768 numbers, 2.8% to 45.5%" in said({"align": table}, "holds").text


def test_underdetermined_pairs_are_counted_with_their_rank():
    """By the rule of the fits, whatever the form: three fitted at low rank, two of other forms."""
    table = scored()
    table["n_train"] = 500  # H is 128: few for a matrix, many for a gain
    table.loc[:4, "underdetermined"] = True
    table.loc[:2, "form"] = "low_rank"
    table.loc[:2, "rank"] = 62
    table.loc[5:, "form"] = "scale"
    text = said({"align": table}, "fewer training tokens than").text
    assert text == (
        f"5 of {len(table)} pairs have fewer training tokens than the adapter asked for needs; "
        "fitted at rank 62."
    )


def test_pairs_that_ran_out_of_time_are_counted():
    table = scored()
    table.loc[:2, "status"] = "not_settled"
    text = said({"align": table}, "ran out of time").text
    assert text.startswith(f"3 of {len(table)} pairs ran out of time before they or their ceiling")


def test_learning_is_summed_up_over_pairs():
    tables = align_result(curves=True).tables
    finding = said(tables, "training tokens the held-out FVU goes from")
    # The made-up curves fall by 0.2 (1 / part - 1) / 7: by 0.2 / 7 from half to all.
    assert finding.numbers["last_step_fvu"] == pytest.approx(-0.2 / 7)
    assert "From 250 to 2,000 training tokens" in finding.text
    assert "low rank" not in finding.text
    learning = tables["learning"].copy()
    learning.loc[learning.n_train < 300, "form"] = "low_rank"
    text = said(tables | {"learning": learning}, "held-out FVU goes from").text
    assert "not all of this is due to the tokens" in text


def test_capacity_is_held_against_every_random_expert():
    tables = align_result(curves=True).tables
    finding = said(tables, "At equal size of the adapter")
    pairs = finding.numbers["pairs"]
    assert pairs == 12
    assert finding.numbers["below_all_random"] == 1  # the planted one; the others lie above
    assert f"in 1 of {pairs} pairs (mean over sizes; about {pairs / 6:.1f} would by" in finding.text
    assert "In 1 of 12 pairs it needs fewer parameters" in finding.text


def test_a_summary_by_layers_is_of_those_layers():
    table = align_result(experts=8, layer_pairs=TWO).table
    layers = by_layers(table).set_index("source_layer")
    for layer in (0, 4):
        own = table[table.source_layer == layer]
        known = own[own.score.notna()]
        assert layers.loc[layer, "pairs"] == len(own)
        assert layers.loc[layer, "scored"] == len(known)
        assert layers.loc[layer, "above_zero"] == (known.score_low > 0).sum()
        assert layers.loc[layer, "fvu"] == known.fvu.median()
        assert layers.loc[layer, "best_score"] == known.score.max()


def test_nothing_is_said_of_curves_without_points():
    table = align_result().table
    empty = {"align": table, "learning": pd.DataFrame(), "capacity": pd.DataFrame()}
    assert [f.text for f in findings(empty)] == [f.text for f in findings({"align": table})]
