from itertools import combinations

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import linregress, norm

import deviants_zoo
import models_zoo
import moescope
from moescope.analyses.swap_blocks.analysis import operations as blocks_work
from moescope.analyses.swap_blocks.analysis import swap_blocks, swapped_blocks
from moescope.analyses.swap_blocks.kept import Kept, Measured
from moescope.analyses.swap_blocks.options import SwapBlocksOptions, layers_of
from moescope.analyses.swap_blocks.reading import of_questions, of_text
from moescope.analyses.swap_blocks.tables import _judge
from moescope.analyses.swap_experts.analysis import operations as experts_work
from moescope.analyses.swap_experts.options import SwapExpertsOptions
from moescope.corpora.packing import Packing
from moescope.corpora.questions import Questions
from moescope.errors import CorpusError, ModelError, MoEScopeError, OptionError
from moescope.evaluate.answers import compare_answers
from moescope.evaluate.paired import compare
from moescope.interventions.blocks import swap_blocks as exchanged
from moescope.interventions.choice import set_top_k
from moescope.models.load import load
from moescope.models.observe import observe
from moescope.reports.registry import chapter

PACKING = Packing(length=16, rows=16)
QUICK = SwapBlocksOptions(bootstrap=50)


def text(number=40):
    random = np.random.default_rng(0)
    documents = [random.integers(3, 97, random.integers(4, 12)).tolist() for _ in range(number)]
    return moescope.Corpus.from_token_ids({"text": documents}, PACKING)


def questions(number=40):
    random = np.random.default_rng(1)
    return Questions.from_token_ids(
        [
            (random.integers(3, 97, 1 + n % 6).tolist(), random.integers(3, 97, 1 + n % 3).tolist())
            for n in range(number)
        ]
    )


@torch.no_grad()
def planted():
    """Layer 4 holds a copy of the block of layer 2, layer 5 one of noise, which it gives nothing.

    So the noise counts only where another layer has it.
    """
    model = load(models_zoo.build("qwen2_moe", num_hidden_layers=6, initializer_range=0.08))
    model.model.get_output_embeddings().weight.mul_(10)  # it is sure of what it says
    layers = model.layers
    layers[4].block.load_state_dict(layers[2].block.state_dict())
    for parameter in layers[5].block.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    layers[5].decoder_layer.post_attention_layernorm.weight.zero_()
    return model


@torch.no_grad()
def own_text(model):
    """What the model itself goes on with, so that whatever disturbs it raises the loss."""
    ids = torch.randint(3, 97, (40, 2), generator=torch.Generator().manual_seed(0))
    for _ in range(10):
        ids = torch.cat([ids, model.model(ids).logits[:, -1:].argmax(-1)], dim=1)
    packing = Packing(length=16, rows=16, packed=False)
    return moescope.Corpus.from_token_ids({"own": ids.tolist()}, packing)


@pytest.fixture(scope="module")
def planted_model():
    return planted()


@pytest.fixture(scope="module")
def planted_result(planted_model):
    return swapped_blocks(planted_model, of_text(planted_model, own_text(planted_model)), QUICK)


@pytest.fixture(scope="module")
def switch():
    return load(deviants_zoo.switch(num_layers=6, num_sparse_encoder_layers=3))


@pytest.fixture(scope="module")
def answers(switch):
    return swapped_blocks(switch, of_questions(switch, questions()), QUICK)


def swapped(table, name):
    (row,) = table[table["swap"] == name].to_dict("records")
    return row


def test_a_block_and_its_copy_change_places_without_a_trace(planted_result):
    row = swapped(planted_result.table, "2-4")
    assert (row["loss_difference"], row["loss_difference_high"]) == (0, 0)
    assert row["loss_verdict"] == "harmless"
    routing = planted_result.tables["routing"].set_index(["swap", "layer"])["count"]
    for layer in range(6):
        assert routing.loc["2-4", layer].tolist() == routing.loc["baseline", layer].tolist()
    distortion = planted_result.tables["distortion"]
    rows = distortion[(distortion["swap"] == "2-4") & (distortion["side"] != "swapped")]
    assert (rows["js_bits"] == 0).all()
    assert (distortion["js_bits"] > 0).any()


def test_a_block_of_noise_is_found_to_be_worst(planted_result):
    done = planted_result.table[planted_result.table["status"] != "unchanged"]
    worst = done.sort_values("loss_difference")["swap"].tail(5)
    assert all(name.endswith("-5") for name in worst)
    assert (done[done["swap"].isin(worst)]["loss_verdict"] == "worse").all()
    said = " ".join(finding.text for finding in planted_result.findings)
    assert f"the worst, {worst.iloc[-1]}, by +" in said
    assert "harmless (changed by less than 0.02 nats, corrected p < 0.025): " in said


def test_swaps_of_a_text_are_those_of_compare(planted_model, planted_result):
    first, last = planted_model.layers[0], planted_model.layers[3]
    change = {"swap": lambda: exchanged(first, last)}
    expected = compare(planted_model, own_text(planted_model), change, bootstrap=50)
    expected = expected[(expected.intervention == "swap") & (expected.domain == "all")].iloc[0]
    row = swapped(planted_result.table, "0-3")
    assert row["loss"] == pytest.approx(expected.loss)
    assert row["loss_difference"] == pytest.approx(expected.difference)
    assert row["loss_difference_low"] == pytest.approx(expected.difference_low)
    assert row["n_tokens"] == expected.n_tokens


def test_swaps_before_questions_are_those_of_compare_answers(switch, answers):
    one, other = layers_of(switch, None)[:2]
    assert (one.stack, one.index, other.index) == ("encoder", 1, 3)
    change = {"swap": lambda: exchanged(one, other)}
    expected = compare_answers(switch, questions(), change, bootstrap=50).iloc[1]
    row = swapped(answers.table, "1-3")
    for name in ("accuracy", "loss", "loss_difference", "loss_difference_low"):
        assert row[name] == pytest.approx(expected[name])
    diagonal = answers.table[answers.table["status"] == "unchanged"]
    assert diagonal["layer"].tolist() == diagonal["other_layer"].tolist() == [1, 3, 5]


def test_a_matrix_of_six_layers_takes_fifteen_swaps_and_the_model_as_it_is():
    model = load(models_zoo.build("mixtral", num_hidden_layers=6))
    reading = of_text(model, text(12))
    passes = []
    handle = model.model.register_forward_hook(lambda *_: passes.append(1))
    result = swapped_blocks(model, reading, QUICK)
    handle.remove()
    assert len(passes) == 16 * len(reading.passages)
    named = [f"{a}-{b}" for a, b in combinations(range(6), 2)]
    assert result.table["swap"].tolist() == ["none"] * 6 + named
    assert result.table["loss_difference_low"].isna().all()  # 12 documents
    assert "too few" in " ".join(finding.text for finding in result.findings)


@torch.no_grad()
def counted(model, one_by_one):
    """How often each expert is used, question by question and so without padding."""
    counts = {(la.stack, la.index): np.zeros(la.num_experts) for la in model.layers}

    def count(seen):
        for expert in seen.routing.experts.flatten().tolist():
            if expert >= 0:
                counts[seen.layer.stack, seen.layer.index][expert] += 1

    with observe(model.layers, count):
        for question, answer in one_by_one:
            decoded = torch.tensor([[0, *answer[:-1]]])
            model.model(input_ids=torch.tensor([question]), decoder_input_ids=decoded)
    return counts


def test_heat_maps_are_counted_by_hand(switch, answers):
    one, other = layers_of(switch, None)[:2]
    expected = {"baseline": counted(switch, questions().pairs)}
    with exchanged(one, other):
        expected["1-3"] = counted(switch, questions().pairs)
    keys = ["swap", "stack", "layer", "expert"]
    table = answers.tables["routing"].set_index(keys).sort_index()
    for name, counts in expected.items():
        assert table.loc[name, "shown"].all()
        for (stack, layer), used in counts.items():
            rows = table.loc[(name, stack, layer)]
            assert rows["count"].tolist() == used.tolist()
            np.testing.assert_allclose(rows["share"], used / used.sum())


def test_layers_before_a_swap_cannot_change(answers):
    table = answers.tables["distortion"].set_index(["swap", "stack", "layer"]).sort_index()
    assert table.loc[("3-5", "encoder", 1), "side"] == "before"
    assert table.loc[("3-5", "encoder", 1), "js_bits"] == 0
    assert table.loc[("3-5", "decoder", 1), "side"] == "after"
    assert table.loc[("1-3", "encoder", 1), "router_of"] == 3
    ordered = table["js_bits_low"] <= table["js_bits"]
    assert ordered.all()
    assert (table["floor_bits"] > 0).all()


def test_the_slope_is_that_of_least_squares(planted_result, answers):
    done = planted_result.table[planted_result.table["status"] == "ok"]
    expected = linregress(done["distance"], done["loss_difference"])
    (row,) = planted_result.tables["decay"].to_dict("records")
    assert row["slope"] == pytest.approx(expected.slope)
    assert row["slope_low"] < row["slope"] < row["slope_high"]
    ranks = done[["distance", "loss_difference"]].rank()
    assert row["rank_correlation"] == pytest.approx(ranks.corr().iloc[0, 1])
    decoder = answers.tables["distortion"].query("stack == 'decoder'")
    means = decoder.groupby("swap")["js_bits"].mean()
    far = answers.table.set_index("swap").loc[means.index, "distance"].astype(float)
    routing = answers.tables["decay"].set_index("measure").loc["routing"]
    assert routing["slope"] == pytest.approx(linregress(far, means).slope)
    tested = answers.tables["decay"].dropna(subset="p_value")  # no answer is ever right
    first, second = tested.sort_values("p_value").itertuples()
    assert first.p_corrected == min(1, 2 * first.p_value)
    assert second.p_corrected == max(first.p_corrected, second.p_value)


def test_experts_alone_keep_the_routers_at_home(switch):
    options = SwapBlocksOptions(bootstrap=20, experts_only=True, stack="decoder", shown=("1-3",))
    result = swapped_blocks(switch, of_questions(switch, questions()), options)
    routing = result.tables["routing"]
    assert (routing["router_of"] == routing["layer"]).all()
    baseline, changed = (routing[routing["swap"] == name] for name in ("baseline", "1-3"))
    for stack, layer, same in (("encoder", 1, True), ("decoder", 1, True), ("decoder", 3, False)):
        here = [
            f[(f["stack"] == stack) & (f["layer"] == layer)]["count"] for f in (baseline, changed)
        ]
        assert (here[0].tolist() == here[1].tolist()) == same
    assert "routing" not in result.tables["decay"].get("measure", pd.Series()).tolist()


def test_layers_without_their_experts_stand_beside(switch):
    options = SwapBlocksOptions(bootstrap=20, stack="decoder", left_out=True)
    result = swapped_blocks(switch, of_questions(switch, questions()), options)
    table = result.tables["left-out"].set_index("layer")
    layer = layers_of(switch, "decoder")[1]
    change = {"none": lambda: set_top_k(layer, 0)}
    expected = compare_answers(switch, questions(), change, bootstrap=20).iloc[1]
    assert table.index.tolist() == [1, 3]
    assert table.loss_difference[3] == pytest.approx(expected.loss_difference)
    assert "Without its routed experts" in result.findings[-1].text


def judged(differences, reach, margin=0.02):
    table = pd.DataFrame({"loss_difference_low": differences, "loss_difference_high": differences})
    table["loss_difference_low"] -= reach
    table["loss_difference_high"] += reach
    _judge(table, "loss", margin)
    return table["loss_verdict"].tolist()


def test_verdicts_are_corrected_for_the_number_of_swaps():
    assert judged([0.009], 0.01) == ["harmless"]
    assert judged([0.009] * 15, 0.01) == ["open"] * 15
    assert judged([0.001] * 15, 0.01) == ["harmless"] * 15
    assert judged([0.06, -0.06, 0.0, np.nan], 0.01) == ["worse", "better", "harmless", ""]
    assert judged([0.0, 0.01, 0.02, 0.03], 0.0) == ["harmless", "harmless", "worse", "worse"]


def test_harm_as_large_as_the_margin_is_seldom_called_harmless():
    """In a family of 15 swaps that all cost the margin: at least one in 1 of 40 families."""
    random = np.random.default_rng(0)
    error = 0.004
    families = [judged(random.normal(0.02, error, 15), norm.ppf(0.975) * error) for _ in range(150)]
    assert (
        sum("harmless" in family for family in families) <= 9
    )  # 99% point of fewer than 4 expected


def test_the_plan_of_a_model_with_one_sparse_layer_is_made(switch):
    single = load(models_zoo.build("mixtral", num_hidden_layers=1))
    assert blocks_work(single, QUICK) > 0
    assert experts_work(single, SwapExpertsOptions()) > 0
    # Three pairs of encoder layers, and the model as it is; three more readings.
    three, six = (blocks_work(switch, SwapBlocksOptions(left_out=left)) for left in (False, True))
    assert six / three == pytest.approx(7 / 4)
    assert experts_work(switch, SwapExpertsOptions()) == three
    two = experts_work(switch, SwapExpertsOptions(pairs=("1.0-3.0",)))
    assert two / three == pytest.approx(2 / 4)


def test_one_document_or_question_is_enough_to_read(switch):
    model = load(models_zoo.build("mixtral", num_hidden_layers=3))
    for name, reading in (
        ("documents", of_text(model, text(1))),
        ("questions", of_questions(switch, questions(1))),
    ):
        on = model if name == "documents" else switch
        result = swapped_blocks(on, reading, QUICK)
        assert set(result.table["status"]) == {"unchanged", f"few_{name}"}
        assert "nan" not in " ".join(finding.text for finding in result.findings)
        assert chapter("swap-blocks").draw(result)


def test_pairs_that_cannot_change_places_are_rows_with_a_reason():
    model = load(models_zoo.build("mixtral", num_hidden_layers=3))
    block = model.layers[2].block
    block.gate.top_k = 3
    result = swapped_blocks(model, of_text(model, text()), QUICK)
    refused = result.table[result.table["status"] == "refused"]
    assert refused["swap"].tolist() == ["0-2", "1-2"]
    assert refused["reason"].str.contains("not built alike").all()
    assert "2 swaps cannot be made (0-2, 1-2)" in result.findings[-1].text
    model.layers[1].block.gate.top_k = 1
    with pytest.raises(OptionError, match="none of the swaps can be made"):
        swapped_blocks(model, of_text(model, text()), QUICK)


def test_what_makes_no_sense_is_refused(switch):
    with pytest.raises(ModelError, match="--questions banking77"):
        of_text(switch, text())
    with pytest.raises(ModelError, match="fewer than two sparse layers"):
        layers_of(load(models_zoo.build("mixtral", num_hidden_layers=1)), None)
    with pytest.raises(ModelError, match="fewer than two"):
        layers_of(load(models_zoo.build("mixtral")), "encoder")
    reading = of_questions(switch, questions(3))
    with pytest.raises(OptionError, match="unknown swap"):
        swapped_blocks(switch, reading, SwapBlocksOptions(shown=("1-7",)))
    for bad in ({"margin_loss": -1.0}, {"margin_accuracy": float("nan")}, {"bootstrap": 0}):
        with pytest.raises(OptionError, match="too small"):
            SwapBlocksOptions(**bad)


def test_questions_that_the_model_cannot_read_are_refused(switch):
    model = load(models_zoo.build("mixtral"))  # reads 64 tokens
    for length, fits in ((62, True), (63, False)):
        asked = Questions.from_token_ids([([3], [4]), ([5] * length, [6, 7])])
        of_questions(switch, asked)  # whose positions have no end
        if fits:
            of_questions(model, asked)
            continue
        with pytest.raises(CorpusError, match=r"65 tokens among questions 1 to 2.*at most 64"):
            of_questions(model, asked)


def test_a_model_whose_loss_is_no_number_is_refused():
    """Sums leave NaN out, and a broken expert would look like a good one."""
    model = load(models_zoo.build("mixtral", num_hidden_layers=2))
    with torch.no_grad():
        for tensor in model.layers[1].expert_tensors(0).values():
            tensor.fill_(torch.nan)
    with pytest.raises(ModelError, match=r"loss of the model is not a number"):
        swapped_blocks(model, of_text(model, text(8)), QUICK)


def test_a_truncated_part_is_named(tmp_path):
    kept = Kept(tmp_path)
    kept.save("baseline", Measured(pd.DataFrame({"loss": [1.0, 2.0]}), {}))
    assert kept.load("baseline").units["loss"].tolist() == [1, 2]
    whole = (tmp_path / "baseline.npz").read_bytes()
    for size in (0, 10, len(whole) // 2, len(whole) - 4):
        (tmp_path / "baseline.npz").write_bytes(whole[:size])
        with pytest.raises(MoEScopeError, match=r"baseline\.npz.*Delete the file"):
            kept.load("baseline")


def test_an_interrupted_run_goes_on_after_what_it_kept(tmp_path, monkeypatch):
    model = load(models_zoo.build("mixtral", num_hidden_layers=3))
    reading = of_text(model, text())
    whole = swapped_blocks(model, reading, QUICK)
    kept = Kept.of(moescope.Run(tmp_path), {"text": 1})
    save = Kept.save

    def interrupted(self, name, measured):
        if name == "decoder-1-2":
            raise KeyboardInterrupt
        save(self, name, measured)

    with monkeypatch.context() as patched:
        patched.setattr(Kept, "save", interrupted)
        with pytest.raises(KeyboardInterrupt):
            swapped_blocks(model, reading, QUICK, kept)
    passes = []
    handle = model.model.register_forward_hook(lambda *_: passes.append(1))
    result = swapped_blocks(model, reading, QUICK, kept)
    handle.remove()
    assert len(passes) == len(reading.passages)
    for name, table in whole.tables.items():
        pd.testing.assert_frame_equal(result.tables[name], table)


def test_a_run_folder_gives_the_same_and_figures_are_drawn(tmp_path, switch):
    model = load(models_zoo.build("mixtral", num_hidden_layers=3))
    corpus = text()
    moescope.capture(model, corpus, tmp_path, tokens=0)
    found = swap_blocks(tmp_path, model=model, corpus=corpus, bootstrap=50)
    direct = swapped_blocks(model, of_text(model, corpus), QUICK)
    pd.testing.assert_frame_equal(found.table, direct.table)
    names = [figure.name for figure in chapter("swap-blocks").draw(found)]
    assert names == [
        "swap-blocks-loss",
        "swap-blocks-distance",
        "swap-blocks-routing-decoder",
        "swap-blocks-distortion",
    ]


def test_figures_of_questions_show_accuracy_and_both_stacks(answers):
    figures = {figure.name: figure for figure in chapter("swap-blocks").draw(answers)}
    assert {
        "swap-blocks-accuracy",
        "swap-blocks-routing-encoder",
        "swap-blocks-routing-decoder",
    } <= figures.keys()
    for figure in figures.values():
        assert figure.specification()["title"] == figure.title
    heat = figures["swap-blocks-routing-decoder"].table
    assert heat["swap"].unique().tolist() == ["baseline", "1-3", "1-5"]
    assert heat["layer"].unique().tolist() == [1, 3]
