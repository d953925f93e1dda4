"""Layers read from checkpoints one at a time: the same weights as in memory, and no more."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
)

import deviants_zoo
import families_zoo
import models_zoo
from moescope.errors import ModelError
from moescope.models.discover import dense_layers, moe_layers
from moescope.models.load import load
from moescope.models.on_disk import in_memory, on_disk
from moescope.models.stacking import StackedBeside, without_copies
from test_models_families import BUILDERS
from test_models_offload_families import NOT_READ_ALONE

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "weight_similarity.py"
WITH_IMAGES = {
    "llama4": deviants_zoo.llama4_with_images,
    "gemma4": deviants_zoo.gemma4_with_images,
}
ALL = BUILDERS | WITH_IMAGES


def assert_same(stored, layers):
    """Weights of every expert and of the router, to the bit, one layer in memory at a time."""
    assert [(la.stack, la.index) for la in stored.layers] == [(la.stack, la.index) for la in layers]
    for layer, same in zip(stored.layers, layers, strict=True):
        with stored.reading(layer):
            assert layer.router_weight.dtype == same.router_weight.dtype
            assert torch.equal(layer.router_weight, same.router_weight)
            assert layer.num_experts == same.num_experts
            for expert in range(same.num_experts):
                found, expected = layer.expert_weights(expert), same.expert_weights(expert)
                assert found.activation == expected.activation
                assert found.tensors().keys() == expected.tensors().keys()
                for name, tensor in expected.tensors().items():
                    assert torch.equal(found.tensors()[name], tensor), name
            others = [la for la in stored.layers if la is not layer]
            assert all(on_meta(other) for other in others)
        assert on_meta(layer)


def read_one(stored):
    with stored.reading(stored.layers[0]):
        stored.layers[0].expert_weights(0)


def on_meta(layer):
    return all(parameter.is_meta for parameter in layer.decoder_layer.parameters())


@pytest.mark.parametrize("family", sorted(ALL.keys() - NOT_READ_ALONE))
def test_weights_are_those_in_memory(family, tmp_path):
    model = ALL[family]()
    model.save_pretrained(tmp_path)
    assert_same(on_disk(tmp_path), moe_layers(model))


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss", "mixtral"])
def test_half_precision_in_shards_is_read_as_load_reads_it(family, tmp_path):
    """Some parameters stay in fp32 whatever the dtype of the rest."""
    BUILDERS[family]().bfloat16().save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert_same(on_disk(tmp_path), load(tmp_path).layers)


@pytest.mark.parametrize("family", sorted(families_zoo.REFUSED.keys() - {"axk1"}))
def test_what_cannot_be_told_without_running_is_refused(family, tmp_path):
    families_zoo.build(family).save_pretrained(tmp_path)
    with pytest.raises(ModelError):
        read_one(on_disk(tmp_path))


def test_dense_layers_are_one_expert_each(tmp_path):
    model = models_zoo.build("qwen2_moe", mlp_only_layers=[0, 1])
    model.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="dense"):
        on_disk(tmp_path)
    assert_same(on_disk(tmp_path, dense_as_experts=True), dense_layers(model))


def test_two_layers_can_be_held_at_once(tmp_path):
    model = models_zoo.build("olmoe", num_hidden_layers=3)
    model.save_pretrained(tmp_path)
    stored = on_disk(tmp_path)
    with stored.reading(stored.layers[0]), stored.reading(stored.layers[2]):
        assert [on_meta(layer) for layer in stored.layers] == [False, True, False]
        down = stored.layers[2].expert_weights(3).down
        assert torch.equal(down, moe_layers(model)[2].expert_weights(3).down)


def test_a_loaded_model_is_read_the_same_way(tmp_path):
    models_zoo.build("mixtral").save_pretrained(tmp_path)
    whole, offloaded = load(tmp_path), load(tmp_path, device_map={"": "disk"})
    stored = in_memory(offloaded)
    assert stored.fingerprint == whole.fingerprint
    for layer, same in zip(stored.layers, whole.layers, strict=True):
        with stored.reading(layer):
            for expert in range(layer.num_experts):
                found = layer.expert_weights(expert).gate
                assert torch.equal(found, same.expert_weights(expert).gate)


def test_damaged_and_missing_weights_are_refused(tmp_path):
    model = models_zoo.build("mixtral")
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[3, 4, 5] = torch.nan
    model.save_pretrained(tmp_path)
    stored = on_disk(tmp_path)
    with stored.reading(stored.layers[0]):
        pass
    with (
        pytest.raises(ModelError, match="of layer 1 are not all finite"),
        stored.reading(stored.layers[1]),
    ):
        pass
    state = {k: v for k, v in model.state_dict().items() if "layers.0.mlp.gate" not in k}
    model.save_pretrained(tmp_path, state_dict=state)
    stored = on_disk(tmp_path)
    with (
        pytest.raises(ModelError, match=r"lacks the weights model.layers.0.mlp.gate.weight"),
        stored.reading(stored.layers[0]),
    ):
        pass


def test_quantised_weights_are_refused(tmp_path):
    model = models_zoo.build("mixtral")
    model.config.quantization_config = {"quant_method": "fp8"}
    model.config.save_pretrained(tmp_path)
    del model.config.quantization_config
    config = (tmp_path / "config.json").read_text()
    model.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(ModelError, match="are quantised"):
        on_disk(tmp_path)


def test_the_fingerprint_is_that_of_the_weights(tmp_path):
    for name, seed in (("one", 0), ("same", 0), ("other", 1)):
        models_zoo.build("mixtral", seed=seed).save_pretrained(tmp_path / name)
    one, same, other = (on_disk(tmp_path / n).fingerprint for n in ("one", "same", "other"))
    assert one == same != other


def test_experts_are_stacked_as_transformers_stacks_them():
    generator = torch.Generator().manual_seed(0)
    names = ["gate", "up"]
    tensors = {
        name: [torch.randn(rows, 4, generator=generator) for _ in range(5)]
        for name, rows in zip(names, (6, 3), strict=True)
    }
    patterns = {"source_patterns": names, "target_patterns": ["both"]}
    stacked = MergeModulelist(dim=0).convert(dict(tensors), **patterns)
    expected = Concatenate(dim=1).convert(stacked, **patterns)["both"]
    found = StackedBeside().convert(dict(tensors), **patterns)
    assert found.keys() == {"both"}
    assert torch.equal(found["both"], expected)


def test_conversions_of_transformers_stay_as_they_are():
    both = WeightConverter(["a", "b"], "c", operations=[MergeModulelist(dim=0), Concatenate(dim=1)])
    other = WeightConverter(["a", "b"], "c", operations=[Concatenate(dim=1)])
    lean = without_copies([both, other, WeightRenaming("d", "e")])
    assert [type(op) for op in lean[0].operations] == [StackedBeside]
    assert [type(op) for op in lean[1].operations] == [Concatenate]
    assert [type(op) for op in both.operations] == [MergeModulelist, Concatenate]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_memory_is_that_of_two_layers():
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "memory", "--mebibytes", "400"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
