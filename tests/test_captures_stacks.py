"""Both stacks of an encoder-decoder, and tokens that experts had no capacity for."""

import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import PreTrainedConfig

import moescope
from moescope.captures.read import Capture
from moescope.captures.record import capture
from moescope.corpora.corpus import Corpus
from moescope.corpora.packing import Packing
from moescope.errors import CaptureError, OptionError
from moescope.models.view import MoEModel
from test_captures_format import Block, HandMade, HandMadeLayer, parsed

# Token t has the input (t, -t) in the encoder and twice that in the decoder. Even tokens use expert
# 0 with weight 1, odd ones expert 1 with 0.5; those above 4 find no capacity left.


class Limited(Block):
    def __init__(self, highest):
        super().__init__()
        self.highest = highest

    def forward(self, x):
        flat = x.reshape(-1, 2)
        self.router(flat)
        odd = flat[:, :1].long() % 2
        full = flat[:, :1] > self.highest
        weights = (1.0 - odd / 2).masked_fill(full, 0)
        return self.experts(flat, odd.masked_fill(full, -1), weights).reshape(x.shape)


class TwoStacks(HandMade):
    def __init__(self, config):
        super().__init__(config)
        self.block = nn.ModuleList([Limited(4.0), Limited(8.0)])

    def forward(self, input_ids, attention_mask, use_cache, **decoder):
        assert torch.equal(input_ids, decoder["decoder_input_ids"])
        assert torch.equal(attention_mask, decoder["decoder_attention_mask"])
        encoded, decoded = self.block
        encoded(self.table(input_ids))
        return SimpleNamespace(last_hidden_state=decoded(2 * self.table(input_ids)))


@pytest.fixture(scope="module")
def model():
    config = PreTrainedConfig(vocab_size=8, num_hidden_layers=6, is_encoder_decoder=True)
    network = TwoStacks(config)
    layers = [
        HandMadeLayer(block, network, index=5, stack=stack, family="hand_made")
        for block, stack in zip(network.block, ("encoder", "decoder"), strict=True)
    ]
    return MoEModel(model=network, tokenizer=None, layers=layers, name="hand made")


CORPUS = Corpus.from_token_ids(
    {"a": [[1, 2, 3], [4, 5, 6]]}, Packing(length=3, rows=1, shuffle=0, skip_first=False)
)


def record(model, out, **changes):
    options = {"tokens": 2, "tokens_per_expert": 1, "shard_tokens": 3} | changes
    return capture(model, CORPUS, out, **options)


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    record(model, folder)
    return folder


def test_both_stacks_are_recorded_beside_each_other(folder):
    first = parsed(folder / "capture" / "tokens-00000.safetensors")
    assert first["encoder.5.experts"] == ("I16", [3, 1], [1, 0, 1])
    assert first["encoder.5.logits"] == ("F32", [3, 2], [1, -1, 2, -2, 3, -3])
    assert first["layer.5.logits"] == ("F32", [3, 2], [2, -2, 4, -4, 6, -6])
    assert first["layer.5.experts"] == ("I16", [3, 1], [0, 0, 0])
    second = parsed(folder / "capture" / "tokens-00001.safetensors")
    assert second["encoder.5.experts"] == ("I16", [3, 1], [0, -1, -1])
    assert second["encoder.5.weights"] == ("F32", [3, 1], [1, 0, 0])
    assert second["layer.5.experts"] == ("I16", [3, 1], [0, -1, -1])
    assert second["token_ids"] == ("I32", [3], [4, 5, 6])
    rows = parsed(folder / "capture" / "rows-00000.safetensors")
    assert rows["encoder.5.inputs"] == ("F32", [3, 2], [1, -1, 2, -2, 3, -3])
    assert rows["layer.5.inputs"] == ("F32", [3, 2], [2, -2, 4, -4, 6, -6])


def test_the_manifest_tells_stacks_and_dropped_tokens(folder):
    manifest = json.loads((folder / "capture" / "manifest.json").read_text())
    facts = [(la["stack"], la["index"], la["unused_slots"]) for la in manifest["layers"]]
    assert facts == [("encoder", 5, 2), ("decoder", 5, 2)]
    assert manifest["options"]["layers"] == [5]
    kinds = {
        entry["file"]: (entry["layers"], entry.get("encoder_layers"))
        for entry in manifest["shards"]
        if entry["kind"] != "tokens"
    }
    assert kinds["rows-00000.safetensors"] == ([5], [5])
    samples = {name: lists for name, lists in kinds.items() if name.startswith("sample")}
    assert (
        samples.items()
        <= {
            "sample-005-00000.safetensors": ([5], None),
            "sample-encoder-005-00000.safetensors": ([], [5]),
        }.items()
    )


def test_a_stack_is_opened_by_its_name(folder):
    encoder, decoder = Capture(folder, stack="encoder"), Capture(folder)
    assert encoder.layers == decoder.layers == [5]
    assert encoder.routing(5).experts.flatten().tolist() == [1, 0, 1, 0, -1, -1]
    assert encoder.inputs(5).values[:, 0].tolist()[:3] == [1, 2, 3]
    assert decoder.inputs(5).values[:, 0].tolist()[:3] == [2, 4, 6]


def test_dropped_tokens_are_nobodys(folder):
    """Index -1 would be the last expert."""
    encoder = Capture(folder, stack="encoder")
    assert encoder.tokens_of(5, 0).tolist() == [1, 3]
    assert encoder.tokens_of(5, 1).tolist() == [0, 2]
    decoder = Capture(folder)
    assert decoder.tokens_of(5, 0).tolist() == [0, 1, 2, 3]
    assert decoder.tokens_of(5, 1).tolist() == []
    assert decoder.expert_inputs(5, 1).tokens.tolist() == []
    for opened in (encoder, decoder):
        assert opened.layer_facts(5)["unused_slots"] == 2
        assert not {4, 5} & set(opened.inputs(5).tokens.tolist())
        for expert in (0, 1):
            sample = set(opened.expert_inputs(5, expert).tokens.tolist())
            assert sample <= set(opened.tokens_of(5, expert).tolist())


def test_the_stacks_are_sampled_apart(model, tmp_path):
    """Each expert of each stack has random numbers of its own."""
    corpus = Corpus.from_token_ids({"a": [[2] * 200]}, Packing(length=200, rows=1, shuffle=0))
    capture(model, corpus, tmp_path, tokens=0, tokens_per_expert=20)
    encoder = Capture(tmp_path, stack="encoder").expert_inputs(5, 0).tokens
    decoder = Capture(tmp_path).expert_inputs(5, 0).tokens
    assert len(encoder) == len(decoder) == 20
    assert encoder.tolist() != decoder.tolist()


def test_unused_slots_are_counted_across_an_interruption(model, folder, tmp_path, monkeypatch):
    from moescope.captures import recorder

    commit, calls = recorder.Recorder.flush, []

    def flush(self):
        commit(self)
        calls.append(None)
        if len(calls) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(recorder.Recorder, "flush", flush)
    with pytest.raises(KeyboardInterrupt):
        record(model, tmp_path)
    record(model, tmp_path)
    for path in (folder / "capture").iterdir():
        assert (tmp_path / "capture" / path.name).read_bytes() == path.read_bytes()


def test_the_loss_of_an_encoder_decoder_is_refused(model, tmp_path):
    with pytest.raises(CaptureError, match="reads the whole row before its decoder predicts"):
        record(model, tmp_path, record=("routing", "token_loss"))


def test_layers_and_stacks_that_are_not_there(model, tmp_path):
    with pytest.raises(OptionError, match="layer 4"):
        record(model, tmp_path, layers=(4, 5))
    record(model, tmp_path)
    path = tmp_path / "capture" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["layers"] = [la for la in manifest["layers"] if la["stack"] == "encoder"]
    path.write_text(json.dumps(manifest))
    with pytest.raises(CaptureError, match=r"no layer of the decoder. Expected: encoder"):
        Capture(tmp_path)


def test_version_1_is_read(folder, tmp_path, model):
    """Without stacks and counts of unused slots, as decoders were recorded before."""
    decoder = MoEModel(model=model.model, tokenizer=None, layers=model.layers[1:], name="hand made")
    before = record(decoder, tmp_path)
    path = tmp_path / "capture" / "manifest.json"
    manifest = json.loads(path.read_text()) | {"schema": 1}
    for layer in manifest["layers"]:
        del layer["stack"], layer["unused_slots"]
    path.write_text(json.dumps(manifest))
    old = Capture(tmp_path)
    assert old.layer_facts(5)["unused_slots"] == 0
    assert torch.equal(old.inputs(5).values, before.inputs(5).values)
    assert record(decoder, tmp_path).manifest["schema"] == 1  # opened, not written again


def test_routing_analysis_does_not_count_dropped_tokens(folder):
    result = moescope.routing(folder, permutations=10, bootstrap=10)
    layer = result.tables["layers"].iloc[0]
    assert layer.unused_slots == 2
    decoder = result.table.query("stack == 'decoder'")
    shares = decoder.set_index(["domain", "expert"]).share
    assert shares["all", 0] == pytest.approx(4 / 6)
    assert shares["all", 1] == 0
