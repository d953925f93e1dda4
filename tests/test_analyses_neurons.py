import numpy as np
import pandas as pd
import pytest
import torch

import captures_zoo
import deviants_zoo
import families_zoo
import models_zoo
from moescope.analyses.neurons import reading as neurons_reading
from moescope.analyses.neurons import selective as neurons_selective
from moescope.analyses.neurons.ablation import nearest, without
from moescope.analyses.neurons.analysis import neurons
from moescope.analyses.neurons.reading import Units, activations, alone, with_parameters
from moescope.captures.read import Capture
from moescope.corpora.corpus import Corpus
from moescope.corpora.packing import Packing
from moescope.errors import CaptureError, ModelError, OptionError
from moescope.evaluate.paired import compare
from moescope.interventions import ablate_neurons, replace_output
from moescope.measures.activations import Activity
from moescope.models.load import load
from moescope.reports.registry import chapter
from test_analyses_topk import make_experts_equal

QUICK = {"permutations": 99, "bootstrap": 200, "tokens": 0}
RECORD = {"record": ("routing", "inputs"), "tokens": 0, "tokens_per_expert": 10_000}
ANSWER, FIRST, HALF = 5, 3, 46
EXPERT, NEURON = 2, 7
SILENT = (0, 1)


def two_domains(documents=72):
    """Text of two domains that is the same but for another half of the vocabulary."""
    random = np.random.default_rng(0)

    def ids(shift):
        found = []
        for _ in range(documents):
            tokens = random.integers(FIRST, FIRST + HALF, random.integers(20, 40))
            tokens[random.random(len(tokens)) < 0.5] = ANSWER
            found.append((tokens + shift).tolist())
        return found

    given = {"here": ids(0), "there": ids(HALF)}
    return Corpus.from_token_ids(given, Packing(length=20, rows=4))


def planted():
    """A model of one layer in which one neuron sees the domain, and writes its usual token.

    Dimension 0 of the embedding tells the domain, 1 is constant, the others are the same for both
    domains. No other neuron sees dimension 0, or writes anything; two of each expert never fire.
    """
    the_model = load(models_zoo.build("qwen2_moe", num_hidden_layers=1, norm_topk_prob=True))
    network, (layer,) = the_model.model, the_model.layers
    table = network.get_input_embeddings().weight
    with torch.no_grad():
        table[FIRST + HALF : FIRST + 2 * HALF] = table[FIRST : FIRST + HALF]
        table[FIRST : FIRST + HALF, 0], table[FIRST + HALF :, 0] = 0.5, -0.5
        table[:, 1], table[:, 2] = 0.5, 0
        network.model.layers[0].self_attn.o_proj.weight.zero_()
        layer.block.shared_expert.down_proj.weight.zero_()
        layer.router_weight[:, 0] = 0
        layer.router_weight[EXPERT] = 10 * torch.eye(32)[1]
        for expert in range(layer.num_experts):
            tensors = layer.expert_tensors(expert)
            gate, up = tensors["gate_up_proj"].chunk(2)
            gate[:, 0] = 0
            gate[list(SILENT)] = 0
            tensors["down_proj"].zero_()
            if expert == EXPERT:
                gate[NEURON] = 10 * torch.eye(32)[0]
                up[NEURON] = torch.eye(32)[1]
                tensors["down_proj"][2, NEURON] = 1
        head = network.get_output_embeddings().weight
        head.zero_()
        head[ANSWER, 2] = 1
    return the_model


def captured(folder, the_model, corpus, **changes):
    captures_zoo.record(folder, the_model, corpus, **(RECORD | changes))
    return folder


@pytest.fixture(scope="module")
def plant(tmp_path_factory):
    the_model, corpus = planted(), two_domains()
    run = captured(tmp_path_factory.mktemp("planted"), the_model, corpus)
    options = QUICK | {"tokens": 10_000, "group": 2, "show": 3}
    return the_model, corpus, run, neurons(run, model=the_model, corpus=corpus, **options)


@pytest.fixture(scope="module")
def model():
    return load(models_zoo.build("qwen2_moe", num_experts_per_tok=3))


@pytest.fixture(scope="module")
def run(model, tmp_path_factory):
    return captured(tmp_path_factory.mktemp("run"), model, captures_zoo.corpus(documents=24))


@pytest.fixture(scope="module")
def result(model, run):
    return neurons(run, model=model, **QUICK)


def ablation(result, text, **chosen):
    table = result.tables["ablation"]
    for name, wanted in {"domain": "here", "text": text, **chosen}.items():
        table = table[table[name] == wanted]
    assert len(table) == 1
    return table.iloc[0]


def test_a_neuron_of_one_domain_is_found(plant):
    result = plant[3]
    first = result.tables["selective"].iloc[0]
    assert (first.expert, first.neuron, first.domain) == (EXPERT, NEURON, "here")
    assert first.p_value == first.p_corrected == 1 / 100
    assert first.reach == 1
    assert first.mean_there == pytest.approx(0, abs=1e-3)
    assert first.mean_here > 5
    # By chance one layer in twenty has another one that is clear.
    assert 1 <= result.table.selective.item() <= 3
    rows = result.tables["tokens"].query("expert == @EXPERT and neuron == @NEURON")
    assert len(rows) == 3
    assert rows.document.nunique() == 3
    assert set(rows.domain) == {"here"}
    assert rows.activation.iloc[0] == rows.activation.max()


def test_without_it_the_loss_rises_in_its_domain_alone(plant):
    result = plant[3]
    own, others = (
        ablation(result, t, kind="neuron", choice="selective") for t in ("own", "others")
    )
    assert own.difference_low > 0.05
    assert others.difference == pytest.approx(0, abs=1e-6)
    contrast = ablation(result, "own - others", kind="neuron", choice="selective")
    assert contrast.difference == pytest.approx(own.difference, abs=1e-6)
    assert contrast.difference_low > 0.05
    whole = ablation(result, "own", kind="expert", choice="selective")
    assert whole.difference == pytest.approx(own.difference, rel=1e-4)


def test_what_is_ablated_is_chosen_on_other_documents(plant):
    for text in ("own", "others"):
        row = ablation(plant[3], text, kind="neuron", choice="selective")
        assert row.n_documents == 36  # of 72
    units = Units(of=np.arange(80), domain_of=np.repeat([0, 1], 40))
    chosen = units.chosen_on()
    assert np.bincount(units.domain_of[chosen]).tolist() == [20, 20]
    values = torch.rand(80, 2, generator=torch.Generator().manual_seed(0))
    values[units.domain_of == 0, 0] += 10 * torch.from_numpy(chosen[:40])
    values[units.domain_of == 0, 1] += 10 * torch.from_numpy(~chosen[:40])
    activity = Activity(80, 2, 0.001)
    activity.add(torch.arange(80), values, values)
    tested = neurons_selective.Tested(units, chosen, neurons.options(**QUICK), 0)
    tested.add(0, activity, np.ones(2))
    found = tested.candidates(["here", "there"], np.ones((2, 1)))
    clear = found[found.p_corrected <= 0.05]
    assert clear.neuron.tolist() == [0]


def test_controls_cost_nothing(plant):
    own = ablation(plant[3], "own", kind="neuron", choice="selective")
    for kind in ("neuron", "expert"):
        for choice in ("random", "matched"):
            row = ablation(plant[3], "own", kind=kind, choice=choice)
            assert row.difference == pytest.approx(0, abs=1e-6)
            assert row.excess == pytest.approx(own.difference, rel=1e-4)
            assert row.excess_low > 0.05


def test_dead_neurons_are_counted_where_tokens_allow_a_verdict(plant):
    result = plant[3]
    experts = result.tables["experts"].set_index("expert")
    enough = experts.n_tokens >= 300
    assert 0 < enough.sum() < 8
    assert (experts.judged == 16 * enough).all()
    assert (experts.dead[enough] >= len(SILENT)).all()
    # The planted neuron is silent there, not dead: no other of its expert is.
    assert experts.dead[EXPERT] == len(SILENT)
    assert (experts.status[~enough] == "few_tokens").all()
    assert result.table.dead.item() == experts.dead.sum()
    assert any("No verdict" in finding.text for finding in result.findings)


def test_active_shares_are_those_of_the_activations(model, run, result):
    capture, layer = Capture(run), model.layers[1]
    for expert, recorded in capture.expert_samples(1, range(8)).items():
        weights = layer.expert_weights(expert)
        values = torch.nn.functional.silu(recorded.values @ weights.gate.T).abs()
        row = result.tables["experts"].query("layer == 1 and expert == @expert").iloc[0]
        assert row.n_tokens == len(values)
        assert row.active == pytest.approx((values > 0.001).float().mean().item(), abs=1e-6)
        assert row.q50 == pytest.approx(values.median().item(), rel=0.03)
        assert row.active_low < row.active < row.active_high or row.active == 1


def test_the_layer_is_the_sum_of_its_experts(result):
    every = result.tables["experts"]
    for _, row in result.table.iterrows():
        experts = every[every.layer == row.layer]
        assert row.n_tokens == experts.n_tokens.sum()
        assert row.active == pytest.approx(np.average(experts.active, weights=experts.n_tokens))
        assert row.neurons == experts.neurons.sum() == 8 * 16


def test_random_text_makes_no_layer_selective(result):
    assert (result.table.p_corrected > 0.01).all()
    assert (result.table.selectivity_low < result.table.selectivity).all()
    assert result.table.selective.sum() <= 4


def test_equal_experts_agree_number_by_number(tmp_path):
    equal = load(models_zoo.build("qwen2_moe", num_experts_per_tok=3))
    for layer in equal.layers:
        make_experts_equal(layer)
    captured(tmp_path, equal, captures_zoo.corpus(documents=6))
    found = neurons(tmp_path, model=equal, **QUICK).tables["agreement"]
    assert found.same.to_numpy() == pytest.approx(1, abs=1e-5)
    assert found.other.max() < 0.5
    assert found[found.measure == "activation"].p_value.to_numpy() == pytest.approx(1 / 200)


def test_random_experts_do_not_agree(result):
    found = result.tables["agreement"]
    assert (found.same - found.other).abs().max() < 0.05
    assert (found.n_pairs == 28).all()


@pytest.mark.parametrize("family", ["gpt_oss", "mixtral", "qwen2_moe", "switch_transformers"])
def test_what_neurons_emit_adds_up_to_the_expert(family):
    if family == "switch_transformers":
        the_model = load(deviants_zoo.switch())
    elif family == "gpt_oss":
        the_model = load(families_zoo.build(family))
    else:
        the_model = load(models_zoo.build(family))
    layer = the_model.layers[0]
    x = 3 * torch.randn(9, layer.hidden_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for expert in (0, 1):
            weights = layer.expert_weights(expert)
            found, emitted = activations(weights, x)
            outputs = emitted @ weights.down.T
            if weights.down_bias is not None:
                outputs = outputs + weights.down_bias
            expected = layer.expert_outputs(x, [expert])[0]
            torch.testing.assert_close(outputs, expected, rtol=1e-4, atol=1e-4)
            some = activations(alone(weights, [3, 1]), x)
            torch.testing.assert_close(some[0], found[:, [3, 1]])
            torch.testing.assert_close(some[1], emitted[:, [3, 1]])


def test_batches_of_tokens_change_nothing(model, run, result, monkeypatch):
    monkeypatch.setattr(neurons_reading, "_VALUES_AT_ONCE", 16 * 5)
    again = neurons(run, model=model, **QUICK)
    for name in ("neurons", "experts", "selective", "agreement"):
        pd.testing.assert_frame_equal(again.tables[name], result.tables[name], rtol=1e-5)


def test_ablations_are_those_of_compare(model):
    corpus = captures_zoo.corpus(documents=5)
    layer = model.layers[0]
    parts = {(0, 1): [2, 5], (1, 3): None}
    found = compare(
        model,
        corpus,
        {
            "one": lambda: without(model, {(0, 1): [2, 5]}),
            "same": lambda: ablate_neurons((layer, 1), [2, 5]),
            "both": lambda: without(model, parts),
            "expert": lambda: replace_output((model.layers[1], 3), 0.0),
        },
        bootstrap=50,
    )
    losses = found[found.domain == "all"].set_index("intervention").loss
    assert losses.one == losses.same
    assert len({losses.baseline, losses.one, losses.both, losses.expert}) == 4


def test_neurons_of_the_nearest_norm_are_chosen_once():
    norms = np.array([1.0, 5.0, 5.2, 9.0, 1.1])
    assert nearest(norms, [1]) == [2]
    assert nearest(norms, [1, 2]) == [4, 3]  # what is left: 1, 9, 1.1
    assert nearest(norms, [0, 1, 2, 3]) == [4]


def test_units_are_documents_or_groups_of_them(run, monkeypatch):
    capture = Capture(run)
    units = Units.of_capture(capture)
    domains = capture.document_domains.numpy()
    assert (units.domain_of[units.of] == domains).all()
    assert len(np.unique(units.of)) == len(domains)
    monkeypatch.setattr(neurons_reading, "_MOST_UNITS", 5)
    few = Units.of_capture(capture)
    assert np.bincount(few.domain_of).tolist() == [5, 5]
    assert (few.domain_of[few.of] == domains).all()
    assert (few.left_out().sum(1) >= 9).all()


def test_both_stacks_of_an_encoder_decoder_are_measured_without_ablations(tmp_path):
    the_model = load(deviants_zoo.switch())
    corpus = captures_zoo.corpus(documents=6)
    captured(tmp_path, the_model, corpus)
    found = neurons(tmp_path, model=the_model, corpus=corpus, **(QUICK | {"tokens": 1_000}))
    assert set(found.table["stack"]) == {"decoder", "encoder"}
    assert "ablation" not in found.tables
    assert "encoder-decoder" in found.findings[-1].text
    layer = the_model.layers[0]
    assert with_parameters(layer) == list(range(layer.num_experts))
    for figure in chapter("neurons").draw(found):
        assert figure.specification()["datasets"]


def test_one_domain_has_nothing_to_compare_with(model, tmp_path):
    documents = [list(range(3, 40)) for _ in range(29)]
    corpus = Corpus.from_token_ids({"only": documents}, Packing(length=12, rows=3))
    captured(tmp_path, model, corpus)
    found = neurons(tmp_path, model=model, **QUICK)
    assert set(found.tables) == {"neurons", "experts", "agreement"}
    assert (found.table.status == "few_documents").any()
    assert chapter("neurons").draw(found)


def test_a_capture_without_what_is_needed_is_refused(model, tmp_path):
    corpus = captures_zoo.corpus(documents=6)
    captured(tmp_path / "a", model, corpus, tokens=50, tokens_per_expert=0)
    with pytest.raises(CaptureError, match="no samples of experts"):
        neurons(tmp_path / "a", model=model, **QUICK)
    captured(tmp_path / "b", model, corpus, record=("routing",))
    with pytest.raises(CaptureError, match="inputs"):
        neurons(tmp_path / "b", model=model, **QUICK)


def test_text_that_cannot_be_read_again_is_asked_for(plant):
    the_model, _, run, _ = plant
    with pytest.raises(CaptureError, match="cannot be opened again"):
        neurons(run, model=the_model, **(QUICK | {"tokens": 100}))


def test_the_model_is_left_as_it_was(plant):
    the_model, _, run, _ = plant
    assert the_model.fingerprint == Capture(run).model_fingerprint


@pytest.mark.parametrize("option", ["threshold", "show", "tokens"])
def test_unfit_options_are_refused(option):
    with pytest.raises(OptionError, match=option):
        neurons.options(**{option: -1.0 if option == "threshold" else -1})


def test_ablations_of_a_broken_plan_are_refused(model):
    with pytest.raises((OptionError, ModelError)), without(model, {(0, 1): [10_000]}):
        pass


def test_findings_say_what_tables_hold(plant):
    result = plant[3]
    said = " ".join(finding.text for finding in result.findings)
    own = ablation(result, "own", kind="neuron", choice="selective")
    assert f"{own.difference:+.4f}" in said
    assert f"{result.table.active.item():.2%}" in said


def test_curves(result):
    share, selective = (curve.read(result) for curve in neurons.curves)
    assert share.value.tolist() == result.table.active.tolist()
    assert selective.value.tolist() == result.table.selective_share.tolist()
    assert share.low.notna().all()


def test_figures(plant):
    drawn = chapter("neurons").draw(plant[3])
    assert [figure.name for figure in drawn] == [
        "neurons-active",
        "neurons-selectivity",
        "neurons-domains",
        "neurons-ablation",
    ]
    for figure in drawn:
        assert figure.specification()["datasets"]
        assert figure.title.endswith("?")
