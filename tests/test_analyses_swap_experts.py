from itertools import combinations, product

import numpy as np
import pandas as pd
import pytest
import torch

import deviants_zoo
import models_zoo
import moescope
from moescope.analyses.swap_blocks.reading import of_questions, of_text
from moescope.analyses.swap_experts.analysis import swap_experts, swapped_experts
from moescope.analyses.swap_experts.options import SwapExpertsOptions
from moescope.corpora.packing import Packing
from moescope.corpora.questions import Questions
from moescope.errors import OptionError
from moescope.evaluate.paired import compare
from moescope.interventions.tensors import swap_experts as exchanged
from moescope.models.load import load
from moescope.reports.registry import chapter


def text():
    random = np.random.default_rng(0)
    documents = [random.integers(3, 97, random.integers(4, 12)).tolist() for _ in range(36)]
    return moescope.Corpus.from_token_ids({"text": documents}, Packing(length=16, rows=16))


@pytest.fixture(scope="module")
def model():
    """Expert 1 of layer 2 is a copy of expert 3 of layer 0."""
    built = load(models_zoo.build("mixtral", num_hidden_layers=3))
    source, copy = (built.layers[n].expert_tensors(e) for n, e in ((0, 3), (2, 1)))
    with torch.no_grad():
        for name, tensor in copy.items():
            tensor.copy_(source[name])
    return built


def swaps(model, **options):
    return swapped_experts(
        model, of_text(model, text()), SwapExpertsOptions(bootstrap=50, **options)
    )


@pytest.fixture(scope="module")
def most_used(model):
    return swaps(model)


def test_chosen_pairs_and_a_copy_that_changes_nothing(model):
    result = swaps(model, pairs=("0.3-2.1", "1.0-2.7", "1.2-1.5", "2.1-0.3"))
    table = result.table.set_index("swap")
    assert table.index.tolist() == ["0.3-2.1", "1.0-2.7", "1.2-1.5"]
    assert (table.loc["0.3-2.1", ["loss_difference", "loss_difference_high"]] == 0).all()
    assert table.loc["0.3-2.1", "loss_verdict"] == "harmless"
    change = {"swap": lambda: exchanged((model.layers[1], 0), (model.layers[2], 7))}
    expected = compare(model, text(), change, bootstrap=50).iloc[2]
    assert (expected.intervention, expected.domain) == ("swap", "all")
    assert table.loss_difference["1.0-2.7"] == pytest.approx(expected.difference)
    assert table.loss_difference_low["1.0-2.7"] == pytest.approx(expected.difference_low)
    assert table.loss_difference["1.2-1.5"] != 0

    assert result.tables["decay"].rank_correlation.isna().all()


def test_the_most_used_expert_of_each_layer(most_used):
    routing = most_used.tables["routing"]
    home = routing[routing["swap"] == "baseline"]
    busiest = home.loc[home.groupby("layer")["count"].idxmax()]
    named = [f"{layer}.{expert}" for layer, expert in busiest[["layer", "expert"]].to_numpy()]
    assert most_used.table["swap"].tolist() == [f"{a}-{b}" for a, b in combinations(named, 2)]
    shares = dict(zip(named, busiest["share"], strict=True))
    for row in most_used.table.itertuples():
        one, other = row.swap.split("-")
        assert (row.share, row.other_share) == (shares[one], shares[other])


def test_routers_stay_and_earlier_layers_do_not_notice(most_used):
    table = most_used.tables["distortion"]
    late = table[table["swap"] == most_used.table["swap"].iloc[-1]].set_index("layer")
    assert late["side"].tolist() == ["before", "swapped", "swapped"]
    assert late["js_bits"].tolist()[:2] == [0, 0]  # the router has read nothing new
    assert late["js_bits"][2] > 0
    assert (table["router_of"] == table["layer"]).all()


def test_all_pairs_of_two_layers():
    small = load(models_zoo.build("mixtral", num_local_experts=3))
    table = swaps(small, layers=(0, 1)).table
    assert table["swap"].tolist() == [f"0.{e}-1.{f}" for e, f in product(range(3), range(3))]
    assert table["loss_difference"].nunique() == 9
    assert (table["loss_p_corrected"] >= table["loss_p_value"]).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pairs": ("0-1",)}, "cannot read a pair"),
        ({"pairs": ("0.1-7.1",)}, "no such sparse layer"),
        ({"pairs": ("0.1-1.8",)}, "no such expert"),
        ({"pairs": ("0.1-0.1",)}, "with itself"),
        ({"layers": (0, 5)}, "no such sparse layer"),
        ({"layers": (1,)}, "two different layers"),
        ({"layers": (0, 1), "pairs": ("0.1-1.1",)}, "exclude each other"),
    ],
)
def test_pairs_that_do_not_exist_are_refused(model, options, message):
    with pytest.raises(OptionError, match=message):
        swaps(model, **options)


def test_encoder_and_decoder_answer_questions_with_experts_exchanged(tmp_path):
    switch = load(deviants_zoo.switch())
    random = np.random.default_rng(1)
    asked = Questions.from_token_ids(
        [(random.integers(3, 97, 5).tolist(), random.integers(3, 97, 2).tolist())] * 33
    )
    result = swapped_experts(
        switch, of_questions(switch, asked), SwapExpertsOptions(bootstrap=20, stack="decoder")
    )
    assert set(result.table["stack"]) == {"decoder"}
    assert result.table["n_questions"].tolist() == [33]
    names = [figure.name for figure in chapter("swap-experts").draw(result)]
    assert names[:2] == ["swap-experts-accuracy", "swap-experts-loss"]
    assert {"swap-experts-routing-encoder", "swap-experts-routing-decoder"} < set(names)


def test_a_run_folder_gives_the_same(tmp_path, model, most_used):
    moescope.capture(model, text(), tmp_path, tokens=0)
    found = swap_experts(tmp_path, model=model, corpus=text(), bootstrap=50)
    pd.testing.assert_frame_equal(found.table, most_used.table)
    for figure in chapter("swap-experts").draw(found):
        assert figure.specification()["title"] == figure.title
