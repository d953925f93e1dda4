import csv
import json
import random

import numpy as np
import pytest
import torch

import deviants_zoo
import models_zoo
import moescope
from moescope.analyses.attribute.analysis import attribute, localised
from moescope.analyses.attribute.direct import contributions
from moescope.analyses.attribute.options import AttributeOptions
from moescope.analyses.attribute.passes import batches_of
from moescope.analyses.attribute.path import direct_rates, final_states
from moescope.analyses.attribute.prompts import Prompt, prompts_of, tokenised
from moescope.analyses.material import Material
from moescope.corpora.packing import Packing
from moescope.corpora.tokens import SpecialTokens
from moescope.errors import CorpusError, OptionError
from moescope.evaluate.predictions import Targets, evaluating, forward, losses
from moescope.interventions import replace_output
from moescope.models.load import load
from moescope.models.readout import Readout
from moescope.reports.registry import chapter

QUICK = AttributeOptions(shuffles=99, bootstrap=50)
PROMPTS = [Prompt("a", [5, 6, 7, 8, 9], 3), Prompt("b", [11, 12, 13], 4), Prompt("c", [8, 9], 3)]
ANSWERS = torch.tensor([3, 4])


def build(family):
    return load(deviants_zoo.DEVIANTS.get(family, lambda: models_zoo.build(family))())


@pytest.fixture(scope="module")
def model():
    return build("qwen2_moe")


@pytest.fixture(scope="module")
def result(model):
    return localised(model, PROMPTS, QUICK)


def last_logits(model, prompt):
    ids = torch.tensor([prompt.ids])
    if model.model.config.is_encoder_decoder:
        start = torch.tensor([[model.model.config.decoder_start_token_id]])
        return model.model(input_ids=ids, decoder_input_ids=start).logits[0, -1]
    return model.forward(ids, head=True).logits[0, -1]


def last_states(model, batch, readout):
    with final_states(readout) as states:
        batch.run(model)
    return batch.last(states[0])


@pytest.mark.parametrize(
    "family", ["granitemoeshared", "llama4_text", "phimoe", "qwen2_moe", "switch_transformers"]
)
def test_the_whole_is_the_logit_and_an_expert_what_is_missing_without_it(family):
    the_model = build(family)
    with evaluating(the_model):
        batches = batches_of(the_model, PROMPTS)
        found = contributions(the_model, batches, ANSWERS)
        for prompt, whole in zip(PROMPTS, found.whole, strict=True):
            logits = last_logits(the_model, prompt)
            expected = logits[ANSWERS] - logits.mean()
            torch.testing.assert_close(whole, expected, rtol=1e-4, atol=1e-4)

        # Nothing comes after the last layer: what is missing without an expert is its own.
        readout, layer = Readout.of(the_model), the_model.layers[-1]
        (batch,) = batches
        before = last_states(the_model, batch, readout)
        expert = int(found.routed[layer].experts[0, 0])
        with replace_output((layer, expert), 0.0):
            missing = before - last_states(the_model, batch, readout)
        # Of everything else in the norm only the scale counts, that of the whole state.
        at = before + missing * torch.tensor([0.0, 1e-3])[:, None, None]
        one, other = (readout.logits(x.flatten(0, 0)) for x in at)
        size = before.square().mean(1), at[1].square().mean(1)
        if family != "phimoe":  # it takes the mean off too
            other = other * (size[1] / size[0]).sqrt()[:, None]
            slope = (other - one) / 1e-3
            expected = (slope[:, ANSWERS] - slope.mean(1, keepdim=True))[batch.numbers.argsort()]
            torch.testing.assert_close(
                found.of((layer, expert)), expected, rtol=2e-2, atol=2e-2 * expected.abs().max()
            )


@torch.no_grad()
def test_all_parts_add_up_with_attention_and_embeddings_computed_apart(model, result):
    decoder = model.model.model
    prompt = PROMPTS[0]
    added = []
    modules = [decoder.embed_tokens, *(layer.self_attn for layer in decoder.layers)]
    handles = [
        module.register_forward_hook(
            lambda _, __, out: added.append((out[0] if isinstance(out, tuple) else out)[0, -1])
        )
        for module in modules
    ]
    states = []
    handles.append(decoder.norm.register_forward_pre_hook(lambda _, x: states.append(x[0][0, -1])))
    logits = last_logits(model, prompt)
    for handle in handles:
        handle.remove()
    scale = (states[0].square().mean() + decoder.norm.variance_epsilon).rsqrt()
    head = model.model.lm_head.weight
    direction = (head[prompt.answer] - head.mean(0)) * decoder.norm.weight * scale
    rest = torch.stack(added).sum(0) @ direction
    parts = localised(model, [prompt], QUICK).tables["parts"].set_index("part").contribution
    assert parts["everything_else"] == pytest.approx(rest.item(), rel=1e-4, abs=1e-4)
    assert parts.drop("logit").sum() == pytest.approx(parts["logit"], rel=1e-6)
    assert parts["logit"] == pytest.approx((logits[prompt.answer] - logits.mean()).item(), rel=1e-4)


@torch.no_grad()
def test_logits_are_meant_before_a_soft_cap(monkeypatch):
    the_model = build("qwen2_moe")
    batches = batches_of(the_model, PROMPTS)
    plain = contributions(the_model, batches, ANSWERS)
    forward = the_model.model.forward

    def capped(*arguments, **named):
        output = forward(*arguments, **named)
        output.logits = 2 * torch.tanh(output.logits / 2)
        return output

    monkeypatch.setattr(the_model.model, "forward", capped)
    torch.testing.assert_close(contributions(the_model, batches, ANSWERS).whole, plain.whole)


def test_direct_paths_are_measured():
    with torch.no_grad():
        for family, expected in (("granitemoeshared", 0.7), ("qwen2_moe", 1.0)):
            the_model = build(family)
            rates = direct_rates(the_model, Readout.of(the_model))
            assert list(rates.values()) == pytest.approx([expected] * 2, abs=1e-4)
        half = load(models_zoo.build("qwen2_moe").to(torch.bfloat16))
        rates = direct_rates(half, Readout.of(half))
        assert list(rates.values()) == pytest.approx([1.0] * 2, abs=2e-3)


@pytest.mark.parametrize("family", ["deepseek_v4", "gemma4_text"])
def test_where_there_is_no_direct_path_ablation_is_left(family):
    result = localised(build(family), PROMPTS, QUICK)
    assert "parts" not in result.tables
    assert result.table.contribution.isna().all()
    assert result.table.ablation_loss.abs().max() > 1e-3
    assert "No direct contributions" in result.findings[-1].text
    names = [figure.name for figure in chapter("attribute").draw(result)]
    assert names == ["attribute-ablation"]


def test_ablation_is_what_evaluate_finds(model, result):
    table = result.table.set_index(["layer", "expert"])
    batches = []
    for prompt in PROMPTS:
        ids = [*prompt.ids, prompt.answer]
        corpus = moescope.Corpus.from_token_ids(
            {"a": [ids]}, Packing(length=len(ids), packed=False)
        )
        batches += corpus.batches(None)

    def last_losses():
        with evaluating(model):
            found = [losses(forward(model, b), Targets.of(b, model.device))[-1] for b in batches]
        return torch.stack(found)

    before = last_losses()
    for layer in model.layers:
        for expert in range(layer.num_experts):
            with replace_output((layer, expert), 0.0):
                rises = (last_losses() - before).tolist()
            found = table.loc[(layer.index, expert)]
            assert found.ablation_loss == pytest.approx(np.mean(rises), rel=1e-3, abs=1e-5)
            if not found.n_using:
                assert found.ablation_loss == found.contribution == 0


def test_an_encoder_decoder_reads_in_one_and_answers_in_the_other():
    the_model = build("switch_transformers")
    table = localised(the_model, PROMPTS[:1], QUICK).table
    encoder = table[table["stack"] == "encoder"]
    assert (encoder.contribution == 0).all()
    top = encoder.loc[encoder.ablation_loss.abs().idxmax()]
    layer = the_model.layer(int(top.layer), "encoder")
    with evaluating(the_model):
        before = last_logits(the_model, PROMPTS[0]).log_softmax(-1)[3]
        with replace_output((layer, int(top.expert)), 0.0):
            after = last_logits(the_model, PROMPTS[0]).log_softmax(-1)[3]
    assert top.ablation_loss == pytest.approx((before - after).item(), rel=1e-3)
    assert abs(top.ablation_loss) > 1e-3


KEYS, CONTEXT, EXPERT = range(10, 18), range(40, 48), 5


def planted():
    """A model without attention, in which one expert writes the answer to every key."""
    the_model = load(models_zoo.build("qwen2_moe"))
    with torch.no_grad():
        for decoder_layer in the_model.model.model.layers:
            decoder_layer.self_attn.o_proj.weight.zero_()
        layer, inputs = the_model.layers[1], []
        with moescope.models.observe.observe([layer], inputs.append):
            the_model.forward(torch.tensor([[*KEYS, *CONTEXT]]))
        x = inputs[0].input
        wanted = torch.tensor([60.0] * 8 + [-60.0] * 8)
        layer.router_weight[EXPERT] = solved(x, wanted[:, None])[0]
        gate = torch.full((16, 16), -20.0)
        gate[range(8), range(8)] = 20.0
        tensors = layer.expert_tensors(EXPERT)
        tensors["gate_up_proj"][:] = torch.cat([solved(x, gate), solved(x, torch.ones(16, 16))])
        answers = the_model.model.lm_head.weight[[key + 50 for key in KEYS]]
        tensors["down_proj"].zero_()
        tensors["down_proj"][:, :8] = answers.T
    return the_model


def solved(x, values):
    """Rows of weights that make these values of the inputs."""
    return torch.linalg.lstsq(x, values).solution.T


def test_planted_facts_are_found_and_controls_are_not_affected():
    source = random.Random(0)
    prompts = [
        Prompt(str(n), [*source.choices(CONTEXT, k=source.randrange(2, 6)), key], key + 50)
        for n, key in enumerate(list(KEYS) * 5)
    ]
    controls = [Prompt("", source.choices(CONTEXT, k=5), 20 + n) for n in range(10)]
    the_model = planted()
    result = localised(the_model, prompts, QUICK, controls)
    table = result.table
    for measure in ("contribution", "ablation_loss"):
        top = table.loc[table[measure].idxmax()]
        assert (top.layer, top.expert) == (1, EXPERT)
        assert top[f"{measure}_p"] == top[f"{measure}_p_corrected"] == 0.01
        assert top[measure] - top[f"{measure}_shuffled"] > 1
        assert top[f"{measure}_low"] > 0
        assert top.control_loss == 0
        assert table.drop(top.name)[measure].max() < top[measure] / 2
    assert (result.tables["prompts"]["rank"] == 1).all()
    drawn = chapter("attribute").draw(result)
    assert [figure.name for figure in drawn] == [
        "attribute-contribution",
        "attribute-ablation",
        "attribute-parts",
        "attribute-agreement",
        "attribute-controls",
    ]
    for figure in drawn:
        assert figure.specification()["datasets"]
        assert figure.title.endswith("?")
    assert "10 places" in " ".join(finding.text for finding in result.findings)


def test_one_answer_for_all_cannot_be_shuffled(model):
    same = [prompt._replace(answer=3) for prompt in PROMPTS]
    table = localised(model, same, QUICK).table
    assert table[["contribution_p", "ablation_loss_p_corrected"]].isna().all(axis=None)
    assert table.status.unique() == ["few_prompts"]


def test_without_an_answer_it_is_what_the_model_finds_most_probable(model):
    result = localised(model, [Prompt("a", [5, 6, 7], None)], QUICK)
    row = result.tables["prompts"].iloc[0]
    assert row.answer_id == last_logits(model, PROMPTS[0]._replace(ids=[5, 6, 7])).argmax()
    assert row["rank"] == 1


@pytest.fixture(scope="module")
def reading(tmp_path_factory):
    """A model that can read text, and a run of it."""
    tokenizer = load("tiny").tokenizer
    the_model = load(models_zoo.build("olmoe", vocab_size=len(tokenizer)), tokenizer=tokenizer)
    corpus = moescope.Corpus.from_sources(
        {"code": "builtin:code"}, Packing(length=64, rows=4, max_tokens=2_000)
    )
    run = tmp_path_factory.mktemp("run")
    moescope.capture(the_model, corpus, run, record=("routing",))
    return the_model, corpus, run


@pytest.mark.parametrize(
    ("prompt", "answer", "text"),
    [("In the year", "of war", "In the year of war"), ("1 + 2 =", "3", "1 + 2 =3")],
)
def test_prompt_and_answer_are_tokenised_as_one_text(reading, prompt, answer, text):
    tokenizer = reading[0].tokenizer
    found = tokenised(reading[0], "p", prompt, answer)
    ids = tokenizer(text)["input_ids"]
    assert [*found.ids, found.answer] == ids[: len(found.ids) + 1]
    assert tokenizer.decode(found.ids) == prompt


def test_facts_are_read_from_tables_and_json_lines(reading, tmp_path):
    facts = [("The capital of France is", "Paris"), ('He said, "no",', "and")]
    with (tmp_path / "a.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("prompt", "answer"), *facts])
    lines = [json.dumps({"id": "x", "prompt": p, "answer": a}) for p, a in facts]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    material = Material(reading[2], reading[0])
    found = [
        prompts_of(material, AttributeOptions(facts=str(tmp_path / name)))
        for name in ("a.csv", "a.jsonl")
    ]
    assert [p[1:] for p in found[0]] == [p[1:] for p in found[1]]
    assert [p[1:] for p in found[0]] == [tokenised(reading[0], "", *fact)[1:] for fact in facts]
    assert [p.name for p in found[1]] == ["x", "x"]
    (tmp_path / "b.csv").write_text("prompt,target\na,b\n")
    with pytest.raises(CorpusError, match="'answer'"):
        prompts_of(material, AttributeOptions(facts=str(tmp_path / "b.csv")))
    with pytest.raises(OptionError, match=r"\.jsonl"):
        prompts_of(material, AttributeOptions(facts="facts.txt"))


def test_done_only_with_the_facts_that_are_in_the_file_now(reading, tmp_path):
    the_model, corpus, run = reading
    (tmp_path / "a.csv").write_text("prompt,answer\nimport,os\n")
    options = AttributeOptions(facts=str(tmp_path / "a.csv"), controls=0, shuffles=9, bootstrap=9)
    material = Material(run, the_model, corpus)
    attribute.run(material, options)
    assert attribute.is_done(material, options)
    (tmp_path / "a.csv").write_text("prompt,answer\nimport,re\n")
    assert not attribute.is_done(material, options)


def test_with_nothing_given_places_of_the_text_are_taken(reading):
    the_model, corpus, run = reading
    result = attribute(run, model=the_model, prompts=6, context=12, shuffles=50, bootstrap=50)
    assert result.table.n_prompts[0] <= 6
    assert "control_loss" not in result.table
    rows = [
        row[row >= 0].tolist() for b in corpus.batches(the_model.tokenizer) for row in b.input_ids
    ]
    options = AttributeOptions(prompts=6, context=12)
    found = prompts_of(Material(run, the_model), options)
    assert len({prompt.name for prompt in found}) == len(found) > 1
    for prompt in found:
        assert len(prompt.ids) <= 12
        ids = [*prompt.ids, prompt.answer]
        assert any(row[i : i + len(ids)] == ids for row in rows for i in range(len(row)))
    again = attribute(run, model=the_model, prompt="import", controls=2, shuffles=9, bootstrap=9)
    assert again.table.n_controls[0] == 2


def test_places_begin_as_the_tokenizer_begins_a_text(reading, monkeypatch):
    the_model, _, run = reading
    monkeypatch.setattr(SpecialTokens, "of", classmethod(lambda cls, _: cls(7, None, 0)))
    for context in (4, 40):
        options = AttributeOptions(prompts=6, context=context)
        for prompt in prompts_of(Material(run, the_model), options):
            assert prompt.ids[0] == 7
            assert prompt.ids.count(7) == 1
            assert len(prompt.ids) <= context + 1


def test_options_that_do_not_go_together_are_refused():
    with pytest.raises(OptionError, match="not both"):
        AttributeOptions(prompt="a", facts="b.csv")
    with pytest.raises(OptionError, match="no prompt"):
        AttributeOptions(answer="a")
    with pytest.raises(OptionError, match="shuffles"):
        AttributeOptions(shuffles=0)


def test_a_model_without_a_tokenizer_says_so(model):
    with pytest.raises(OptionError, match="without a tokenizer"):
        tokenised(model, "prompt", "a", "b")
