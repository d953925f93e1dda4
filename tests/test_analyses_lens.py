"""The lens over a corpus and a prompt: numbers, tables, figures and refusals."""

import json
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.decoders import Metaspace
from tokenizers.models import BPE
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import captures_zoo
import deviants_zoo
import models_zoo
import moescope
from moescope.analyses.lens.analysis import lens
from moescope.analyses.lens.options import LensOptions
from moescope.analyses.material import Material
from moescope.analyses.prompts import visible
from moescope.decoding.columns import columns_of
from moescope.decoding.translators import Translators
from moescope.errors import ModelError, OptionError
from moescope.models.load import load
from moescope.reports.registry import chapter

TINY = Path(moescope.__file__).parent / "models" / "reference" / "tiny"
PROMPT = "one two\nthree"
RECORD = {"record": ("routing",), "tokens": 0, "tokens_per_expert": 0}


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY)


@pytest.fixture(scope="module")
def model(tokenizer):
    return load(models_zoo.build("qwen2_moe", vocab_size=len(tokenizer)), tokenizer=tokenizer)


@pytest.fixture(scope="module")
def corpus():
    return captures_zoo.corpus(documents=40, rows=40)


@pytest.fixture(scope="module")
def run(model, corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    captures_zoo.record(folder, model, corpus, **RECORD)
    return folder


@pytest.fixture(scope="module")
def result(model, run, corpus):
    return lens(run, model=model, corpus=corpus, prompt=PROMPT, bootstrap=100)


def rows(table, **values):
    for name, value in values.items():
        table = table[table[name] == value]
    return table


def test_every_layer_column_and_domain_is_there(result, model):
    table = result.table
    for layer in model.layers:
        names = [column.label(layer) for column in columns_of(layer)]
        assert rows(table, layer=layer.index, domain="all")["column"].tolist() == names
    assert table.groupby(["layer", "column"])["domain"].agg(list).map(tuple).unique().tolist() == [
        ("all", "long", "short")
    ]
    assert set(table["status"]) == {"ok", "few_documents"}
    interval = rows(table, domain="all")
    assert (interval["kl_low"] <= interval["kl"]).all()


@torch.no_grad()
def test_means_are_those_of_every_single_prediction(result, model, corpus):
    """Layer outputs from the hidden states of transformers, one prediction after the other."""
    sums, network = defaultdict(float), model.model
    for batch in corpus.batches(model.tokenizer):
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        output = network(**inputs, output_hidden_states=True)
        early = network.lm_head(network.model.norm(output.hidden_states[1])).log_softmax(-1)
        final = output.logits.log_softmax(-1)
        for r, p in batch.kept.nonzero().tolist():
            document = batch.documents[r, p]
            if p + 1 < batch.kept.shape[1] and document == batch.documents[r, p + 1]:
                one, own, said = early[r, p], final[r, p], batch.input_ids[r, p + 1]
                sums["n"] += 1
                sums["kl"] += (own.exp() * (own - one)).sum().item()
                sums["agreement"] += float(one.argmax() == own.argmax())
                sums["loss"] -= one[said].item()
                sums["final loss"] -= own[said].item()
    (row,) = rows(result.table, layer=0, kind="output", domain="all").itertuples()
    assert row.n_tokens == sums["n"]
    for measure in ("kl", "agreement", "loss"):
        assert getattr(row, measure) == pytest.approx(sums[measure] / sums["n"], rel=1e-4)
    (last,) = rows(result.table, layer=1, kind="output", domain="all").itertuples()
    assert last.kl < 1e-6
    assert last.agreement == 1
    assert last.loss == pytest.approx(sums["final loss"] / sums["n"], rel=1e-5)


def test_every_place_of_the_prompt(result, model, tokenizer):
    table, ids = result.tables["prompt"], tokenizer(PROMPT)["input_ids"]
    cells = sum(len(columns_of(layer)) for layer in model.layers)
    assert table.groupby("position").size().tolist() == [cells] * len(ids)
    assert table.drop_duplicates("position")["token"].tolist() == [
        visible(tokenizer, number) for number in ids
    ]
    with torch.no_grad():
        logits = model.model(torch.tensor([ids])).logits[0]
    best = logits.softmax(-1).topk(5)
    own = rows(table, layer=1, kind="output")
    for place in range(5):
        assert own[f"p_{place + 1}"].tolist() == pytest.approx(best.values[:, place].tolist())
        names = [visible(tokenizer, number) for number in best.indices[:, place].tolist()]
        assert own[f"top_{place + 1}"].tolist() == names


def test_experts_of_a_cell_are_those_that_the_router_chose(result, model, tokenizer):
    seen = []
    with moescope.models.observe.observe(model.layers[:1], seen.append), torch.no_grad():
        model.forward(torch.tensor([tokenizer(PROMPT)["input_ids"]]))
    routing = seen[0].routing
    first = rows(result.tables["prompt"], layer=0, position=2).set_index("column")["experts"]
    weights, slots = routing.weights[2].sort(descending=True)
    chosen = routing.experts[2, slots].tolist()
    said = [f"{e} ({w:.2f})" for e, w in zip(chosen, weights, strict=True)]
    assert first["layer output"] == first["r + S + top 2"] == ", ".join(said)
    assert [first["expert 1"], first["r + expert 2"]] == said
    assert first["r"] == first["r + S"] == ""


def test_a_prompt_alone_needs_no_text(model, run):
    alone = lens(run, model=model, prompt=PROMPT, tokens=0, bootstrap=100)
    assert set(alone.table["domain"]) == {"all", "prompt"}
    assert set(alone.table["status"]) == {"few_documents"}
    assert any("No intervals" in finding.text for finding in alone.findings)


def test_translators_stand_before_the_readout_of_streams(result, model, run, corpus, tmp_path):
    """A translator that gives one state whatever comes: streams all say the same, experts not."""
    width = model.layers[0].hidden_size
    constant = Translators.identity(model, [0, 1])
    constant.weights[0].copy_(-torch.eye(width))
    constant.biases[0].copy_(torch.arange(float(width)))
    constant.save(tmp_path / "translators")
    options = {"translators": tmp_path / "translators", "prompt": PROMPT, "tokens": 0}
    tuned = lens(run, model=model, bootstrap=100, **options).tables["prompt"]
    plain = result.tables["prompt"]
    streams = tuned[(tuned["kind"] != "alone") & (tuned["layer"] == 0)]
    assert streams["top_1"].nunique() == 1
    same = (tuned["kind"] == "alone") | (tuned["layer"] == 1)
    assert tuned[same]["p_1"].tolist() == pytest.approx(plain[same]["p_1"].tolist())


def test_done_only_with_the_translators_that_are_there_now(model, run, corpus, tmp_path):
    options = LensOptions(translators=tmp_path, prompt=PROMPT, tokens=0, bootstrap=10)
    material = Material(run, model, corpus)
    assert not lens.is_done(material, options)
    Translators.identity(model, [0, 1]).save(tmp_path)
    result = lens.run(material, options)
    assert "may have been trained on documents of this text" in result.findings[0].text
    assert chapter("lens").draw(result)[0].limits.startswith("States of the stream passed")
    assert lens.curves[0].read(result).empty
    assert lens.is_done(material, options)
    others = Translators.identity(model, [0, 1])
    others.weights[0].fill_(0.1)
    others.save(tmp_path)
    assert not lens.is_done(material, options)


def test_translators_of_another_model_are_refused(model, run, tmp_path):
    other = replace(Translators.identity(model, [0, 1]), model_fingerprint="another")
    other.save(tmp_path)
    with pytest.raises(ModelError, match="not those of the model"):
        lens(run, model=model, prompt=PROMPT, tokens=0, translators=tmp_path)


def test_encoder_decoders_have_a_lens_without_loss(tmp_path):
    model = load(deviants_zoo.switch())
    corpus = captures_zoo.corpus(documents=6, rows=40)
    captures_zoo.record(tmp_path, model, corpus, **RECORD)
    found = lens(tmp_path, model=model, corpus=corpus, bootstrap=100)
    assert "loss" not in found.table
    assert set(found.table["stack"]) == {"decoder"}
    assert any("encoder are left out" in finding.text for finding in found.findings)


def test_parts_that_do_not_exist_are_undefined(tmp_path):
    model = load(deviants_zoo.gemma4())
    corpus = captures_zoo.corpus(documents=6, rows=40)
    captures_zoo.record(tmp_path, model, corpus, **RECORD)
    table = lens(tmp_path, model=model, corpus=corpus, bootstrap=100).table
    assert set(table[table["status"] == "undefined"]["kind"]) == {"top", "added", "alone"}
    assert table[table["status"] == "undefined"]["kl"].isna().all()


@pytest.mark.parametrize(
    ("options", "said"), [({"tokens": -1}, "too small"), ({"tokens": 0}, "no text to read")]
)
def test_refuses_options_that_do_not_fit(options, said):
    with pytest.raises(OptionError, match=said):
        LensOptions(**options)


def test_a_prompt_needs_a_tokenizer_and_a_token(model, run):
    with pytest.raises(OptionError, match="without a tokenizer"):
        lens(run, model=replace(model, tokenizer=None), prompt=PROMPT, tokens=0)
    with pytest.raises(OptionError, match="holds no token"):
        lens(run, model=model, prompt="")


def test_tokens_can_be_seen(tokenizer):
    def seen(text):
        return "".join(visible(tokenizer, number) for number in tokenizer(text)["input_ids"])

    assert seen("a b\n\tc <i>") == "a\u00b7b\\n\\tc\u00b7<i>"


def test_tokens_of_tokenizers_that_drop_the_first_space_show_it():
    vocabulary = {"<unk>": 0, "\u2581Paris": 1, "is": 2, "\u2581": 3}
    backend = Tokenizer(BPE(vocabulary, [], unk_token="<unk>"))
    backend.decoder = Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    assert tokenizer.decode([1]) == "Paris"
    assert [visible(tokenizer, n) for n in (1, 2, 3)] == ["\u00b7Paris", "is", "\u00b7"]


def test_the_curve_is_that_of_layer_outputs(result):
    (curve,) = lens.curves
    frame = curve.read(result)
    expected = rows(result.table, kind="output", domain="all")
    assert frame["layer"].tolist() == [0, 1]
    assert frame["value"].tolist() == expected["kl"].tolist()
    assert (frame["low"] < frame["value"]).iloc[0]


def test_figures(result, model, run):
    layers, prompt = chapter("lens").draw(result)
    json.dumps(layers.specification(), allow_nan=False)
    spec = prompt.specification()
    (data,) = spec["datasets"].values()
    assert len(data) == len(result.tables["prompt"])
    assert {param["name"] for param in spec["params"]} == {"place", "colour"}
    place = next(param for param in spec["params"] if param["name"] == "place")
    assert place["value"] == max(row["position"] for row in data)
    assert place["bind"]["options"] == sorted({row["position"] for row in data})
