import dataclasses
import shutil

import numpy as np
import pandas as pd
import pytest
import torch

import captures_zoo
import models_zoo
from moescope.analyses.routing.analysis import routing
from moescope.analyses.weights.analysis import weights
from moescope.comparison import compare, findings, side_by_side
from moescope.errors import OptionError
from moescope.models.load import load
from moescope.reports.registry import chapter
from moescope.runs import Run
from results_zoo import curve, routing_result

KEY = {("a", "m", "decoder")}


def with_limits(values, reach):
    table = curve(values)
    return table.assign(low=table.value - reach, high=table.value + reach)


def test_layers_and_means_are_held_against_the_first_run():
    table = side_by_side({"x": with_limits([1, 3], 0.3), "y": with_limits([2, 7], 0.4)}, KEY)
    y = table[table.run == "y"].set_index("layer")
    assert y.difference.to_dict() == {"0": 1, "1": 4, "mean": 2.5}
    assert y.difference_low["1"] == pytest.approx(3.5)  # 0.3, 0.4, 0.5
    assert y.difference_high["mean"] == pytest.approx(3.0)
    assert y.position.tolist()[:2] == [0, 1]
    assert y.value["mean"] == 4.5
    x = table[table.run == "x"]
    assert (x.difference == 0).all()
    assert x.difference_low.isna().all()


def test_models_of_other_depth_are_compared_by_their_means():
    table = side_by_side({"x": curve([1, 2]), "y": curve([5, 5, 5])}, KEY)
    y = table[table.run == "y"].set_index("layer")
    assert np.isnan(y.difference["2"])
    assert y.difference["mean"] == 3.5
    assert y.position["1"] == 0.5


def test_findings_speak_of_differences_beyond_their_interval():
    near = side_by_side({"x": with_limits([1, 1], 1.0), "y": with_limits([2, 2], 1.0)}, KEY)
    assert findings(near)[0].numbers == {"measures": 1, "differ": 0}
    assert len(findings(near)) == 1
    far = side_by_side({"x": with_limits([1, 1], 0.1), "y": with_limits([2, 2], 0.1)}, KEY)
    assert findings(far)[0].numbers == {"measures": 1, "differ": 1}
    assert "x 1 (0.9 to 1.1); y 2 (1.9 to 2.1)" in findings(far)[1].text


def test_many_differences_are_corrected_for_their_number():
    measures = [f"m{number}" for number in range(20)]
    key = {("a", measure, "decoder") for measure in measures}
    first, other = (
        pd.concat([with_limits([v, v], 0.1).assign(measure=m) for m in measures]) for v in (1, 1.15)
    )
    table = side_by_side({"x": first, "y": other}, key)
    assert (table.difference_low[table.run == "y"] > 0).all()  # 0.15, 0.14 to either side
    assert findings(table)[0].numbers == {"measures": 20, "differ": 0}


def test_base_against_fine_tuned(tmp_path):
    base = load(models_zoo.build("qwen2_moe", num_experts_per_tok=3))
    tuned = load(models_zoo.build("qwen2_moe", num_experts_per_tok=3))
    corpus = captures_zoo.corpus(documents=60)
    network = tuned.model.train()
    optimiser = torch.optim.SGD(network.parameters(), lr=0.5)
    for batch in list(corpus.batches(None))[:3]:
        network(input_ids=batch.input_ids, labels=batch.input_ids).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    tuned = load(network.eval())
    for name, model in {"base": base, "tuned": tuned}.items():
        captures_zoo.record(tmp_path / name, model, corpus, record=("routing",))
        routing(tmp_path / name, permutations=19, bootstrap=100)
        weights(tmp_path / name, model=model, permutations=19, matched=1, null_pairs=1)
    shutil.copytree(tmp_path / "base", tmp_path / "same")
    compared = compare([tmp_path / n for n in ("base", "same", "tuned")], tmp_path / "out")
    result = compared.result("compare")
    table = result.table.set_index("run")
    assert set(table.analysis) == {"routing", "weights"}
    assert (table.loc["same"].difference.dropna() == 0).all()
    assert table.loc["tuned"].difference.abs().max() > 0
    assert "same text" in result.findings[0].text
    first, _, last = result.tables["runs"].model_fingerprint
    assert first != last


@pytest.fixture
def runs(tmp_path):
    for number, name in enumerate(("early", "late")):
        result = routing_result(seed=number)
        result.save(Run(tmp_path / name).results_folder)
    return tmp_path / "early", tmp_path / "late"


def test_runs_on_disk(runs, tmp_path):
    compared = compare(runs, tmp_path / "both")
    result = compared.result("compare")
    assert result.table.run.unique().tolist() == ["early", "late"]
    assert result.tables["runs"].model.tolist() == ["tiny", "tiny"]
    assert "same text" in result.findings[0].text
    own = Run(runs[1]).result("routing").tables["layers"]["router_entropy_bits"]
    entropy = result.table[result.table.measure == "mean entropy of the router (bits)"]
    late = entropy[(entropy.run == "late") & (entropy.layer != "mean")]
    assert late.value.tolist() == own.tolist()
    for figure in chapter("compare").draw(result):
        assert figure.specification()["facet"]


def test_other_options_are_told(runs, tmp_path):
    result = routing_result(seed=5)
    options = {**result.provenance, "options": {"seed": 7}}
    dataclasses.replace(result, provenance=options).save(Run(runs[1]).results_folder)
    said = compare(runs, tmp_path / "both").result("compare").findings[0]
    assert "other options than in early: routing in late" in said.text


def test_one_run_is_refused(runs, tmp_path):
    with pytest.raises(OptionError, match="two or more"):
        compare(runs[:1], tmp_path / "both")
    with pytest.raises(OptionError, match="different names"):
        compare([runs[0], runs[0]], tmp_path / "both")


def test_runs_without_common_measures_are_refused(runs, tmp_path):
    Run(tmp_path / "none").results_folder.mkdir(parents=True)
    with pytest.raises(OptionError, match="none at all in none"):
        compare([runs[0], tmp_path / "none"], tmp_path / "both")
    assert not (tmp_path / "both").exists()


def test_a_measure_of_one_run_alone_is_left_out():
    other = pd.concat([curve([1, 2]), curve([3, 4], measure="n")])
    table = side_by_side({"x": curve([1, 2]), "y": other}, KEY)
    assert set(table.measure) == {"m"}
