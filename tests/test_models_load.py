"""Loading: what works, and one clear error for everything that cannot."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from models_zoo import FAMILIES, VOCABULARY, build
from moescope.errors import ConformanceError, ModelError, MoEScopeError, OptionError
from moescope.models import checkpoint
from moescope.models.load import load

SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


@pytest.fixture(autouse=True)
def hub(monkeypatch):
    """A Hub that answers nothing and remembers what it was asked."""
    asked = []

    def refuse(name, *, revision, allow_patterns):
        asked.append(name)
        raise LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(checkpoint, "snapshot_download", refuse)
    return asked


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "qwen"
    build("qwen2_moe").save_pretrained(folder)
    return folder


@pytest.fixture
def copy(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def tokenizer():
    words = {f"w{number}": number for number in range(VOCABULARY)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")), pad_token="w0"
    )


def logits(model):
    ids = torch.arange(20).reshape(2, 10)
    with torch.no_grad():
        return model.model(input_ids=ids).logits


@pytest.mark.parametrize("shards", ["5GB", "20KB"])
@pytest.mark.parametrize("family", FAMILIES)
def test_saved_and_loaded_again(family, shards, tmp_path, hub):
    original = build(family)
    original.save_pretrained(tmp_path / "saved", max_shard_size=shards)
    loaded = load(tmp_path / "saved")
    assert torch.equal(logits(loaded), logits(load(original)))
    assert not loaded.model.training
    assert loaded.name == str(tmp_path / "saved")
    assert (loaded.tokenizer, loaded.revision, loaded.dtype) == (None, None, torch.float32)
    assert not hub


def test_dtypes(copy):
    load(copy, dtype="bfloat16").model.save_pretrained(copy)
    assert load(copy).dtype == torch.bfloat16
    assert load(copy, dtype=torch.float32).dtype == torch.float32
    with pytest.raises(OptionError, match="floaty"):
        load(copy, dtype="floaty")


def test_in_memory():
    model = build("olmoe").train()
    seen = load(model)
    assert seen.model is model
    assert not model.training
    assert seen.name == "in memory"
    assert load(build("olmoe").model).layers  # without a language-modelling head too
    with pytest.raises(OptionError, match="in memory"):
        load(model, dtype="bfloat16")


def test_tokenizers(copy, tmp_path):
    other = tokenizer()
    assert load(copy, tokenizer=other).tokenizer is other
    assert load(build("olmoe"), tokenizer=other).tokenizer is other
    other.save_pretrained(tmp_path / "tokenizer")
    assert load(copy, tokenizer=tmp_path / "tokenizer").tokenizer.vocab_size == VOCABULARY
    other.save_pretrained(copy)
    assert load(copy).tokenizer.vocab_size == VOCABULARY
    (copy / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="tokenizer"):
        load(copy)
    with pytest.raises(ModelError, match="no tokenizer"):
        load(build("olmoe"), tokenizer=checkpoint.Path(tmp_path))


def test_reference_model_by_name(saved, monkeypatch, hub):
    monkeypatch.setattr(checkpoint, "_REFERENCE", saved.parent)
    assert load("qwen").name == "qwen"
    with pytest.raises(ModelError, match="Did you mean 'qwen'"):
        load("qwem")
    assert not hub


@pytest.mark.parametrize(
    "name", ["nothing", "./no/such", "/no/such", "../up", "~/nowhere", "a/b/c", "src/moescop", ""]
)
def test_names_that_never_reach_the_hub(name, hub):
    with pytest.raises(ModelError, match=r"there is no model|holds no"):
        load(name)
    assert not hub


def test_folder_that_only_looks_like_a_hub_id(saved, monkeypatch, hub):
    monkeypatch.chdir(saved.parent.parent)
    assert load(f"{saved.parent.name}/qwen").layers
    with pytest.raises(ModelError, match="there is no model"):
        load(f"{saved.parent.name}/qwem")
    assert not hub


def test_hub_without_connection(hub):
    with pytest.raises(ModelError, match=r"does not give some-owner/some-moe.*no connection"):
        load("some-owner/some-moe")
    assert hub == ["some-owner/some-moe"]


def test_hub(saved, tmp_path, monkeypatch):
    commit = tmp_path / ("c0ffee" * 7)
    asked = []

    def give(name, *, revision, allow_patterns):
        asked.append((name, revision, tuple(allow_patterns)))
        shutil.copytree(saved, commit, dirs_exist_ok=True)
        return str(commit)

    monkeypatch.setattr(checkpoint, "snapshot_download", give)
    model = load("owner/model", revision="main")
    assert (model.name, model.revision) == ("owner/model", commit.name)
    assert [(name, revision) for name, revision, _ in asked] == [
        ("owner/model", "main"),
        ("owner/model", commit.name),
    ]
    assert "*.py" not in asked[0][2]
    assert asked[1][2] == ("model.safetensors",)
    with pytest.raises(OptionError, match="revisions"):
        load(saved, revision="main")


def test_pickled_checkpoints_are_refused(copy):
    whole = copy / "model.safetensors"
    torch.save(load_file(whole), copy / "pytorch_model.bin")
    assert load(copy).layers  # a pickle beside safetensors is not touched
    whole.unlink()
    with pytest.raises(ModelError, match=r"pickled.*refused.*pytorch_model\.bin"):
        load(copy)
    with pytest.raises(ModelError, match="pickled"):
        load(copy / "pytorch_model.bin")
    (copy / "pytorch_model.bin").rename(copy / "consolidated.00.pt")
    with pytest.raises(ModelError, match="pickled"):
        load(copy)


def test_folders_without_a_model(copy, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"no model\.safetensors"):
        load(tmp_path / "empty")
    with pytest.raises(ModelError, match="is a file"):
        load(copy / "model.safetensors")
    (copy / "config.json").write_text("{")
    with pytest.raises(ModelError, match="cannot read"):
        load(copy)
    (copy / "config.json").unlink()
    with pytest.raises(ModelError, match=r"no config\.json"):
        load(copy)


@pytest.mark.parametrize("keep", [-500, 100, 4, 0])
def test_truncated_weights(copy, keep):
    shard = copy / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:keep])
    with pytest.raises(ModelError, match=r"model\.safetensors is damaged"):
        load(copy)


def test_damaged_and_missing_shards_are_named(tmp_path):
    build("mixtral").save_pretrained(tmp_path, max_shard_size="20KB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 2
    content = shards[1].read_bytes()
    shards[1].write_bytes(content[:-1])
    with pytest.raises(ModelError, match=f"{shards[1].name} is damaged"):
        load(tmp_path)
    shards[1].unlink()
    with pytest.raises(ModelError, match=f"holds no {shards[1].name}"):
        load(tmp_path)


def test_incomplete_weights(copy):
    weights = load_file(copy / "model.safetensors")
    del weights["model.layers.1.mlp.gate.weight"]
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks weights.*layers\.1\.mlp\.gate\.weight"):
        load(copy)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_are_not_finite(value, dtype, tmp_path):
    model = build("qwen2_moe").to(dtype)
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[3, 2, 1] = value
    message = r"layers\.1\.mlp\.experts\.down_proj are not all finite. Got: 1 of 4096"
    with pytest.raises(ModelError, match=message):
        load(model)
    model.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=message):
        load(tmp_path)


def test_dense_models(tmp_path):
    dense = LlamaForCausalLM(LlamaConfig(**SMALL))
    with pytest.raises(ModelError, match="LlamaForCausalLM is a dense model"):
        load(dense)
    dense.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="dense"):
        load(tmp_path)
    with pytest.raises(ModelError, match="dense"):
        load(build("qwen3_moe", mlp_only_layers=[0, 1]))


def test_a_family_that_nobody_has_named_loads_if_it_follows_the_pattern():
    model = build("mixtral")
    model.config.model_type = "new"
    for layer in model.model.layers:
        layer.mlp.__class__ = type("NewBlock", (type(layer.mlp),), {})
    assert {layer.family for layer in load(model).layers} == {"new"}


def test_blocks_of_another_pattern_are_named():
    model = build("mixtral")
    model.model.layers[1].mlp.experts = torch.nn.ModuleList([torch.nn.Linear(32, 32)])
    with pytest.raises(
        ModelError, match=r"MixtralForCausalLM.*MixtralSparse.* at model\.layers\.1\.mlp"
    ):
        load(model)
    for layer in model.model.layers:
        del layer.mlp.experts
    with pytest.raises(ModelError, match="MixtralForCausalLM, model type mixtral, are built"):
        load(model)


def test_unknown_nonlinearity_is_named():
    model = build("mixtral")
    model.model.layers[1].mlp.experts.act_fn = torch.nn.Softplus()
    with pytest.raises(ModelError, match="nonlinearity of MixtralExperts"):
        load(model)


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "never-heard-of"},
        {"model_type": "t5"},
        {"model_type": "mine", "auto_map": {"AutoModelForCausalLM": "model.Mine"}},
    ],
)
def test_classes_that_transformers_cannot_make(copy, config):
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="cannot read"):
        load(copy)


def test_all_errors_are_moescope_errors():
    assert issubclass(ConformanceError, ModelError)
    assert issubclass(ModelError, MoEScopeError)
