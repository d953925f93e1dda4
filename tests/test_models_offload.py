"""Models whose weights lie on disk or in CPU memory between forward passes."""

import gc

import pytest
import torch

import captures_zoo
import models_zoo
from moescope.errors import ModelError
from moescope.models.conformance import conformance
from moescope.models.load import load

FAMILIES = ["mixtral", "qwen2_moe", "olmoe", "deepseek_v3"]
DISK = {"": "disk"}
MIXED = {
    "model.embed_tokens": "cpu",
    "model.layers": "disk",
    "model.norm": "cpu",
    "model.rotary_emb": "cpu",
    "lm_head": "disk",
}
IDS = torch.arange(3, 35).reshape(2, 16)


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    models_zoo.build(request.param).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["disk", "mixed"])
def offloaded(request, folder):
    return load(folder, device_map=DISK if request.param == "disk" else MIXED)


@pytest.fixture(scope="module")
def whole(folder):
    return load(folder)


def on_meta(model):
    return [parameter.is_meta for layer in model.layers for parameter in layer.block.parameters()]


def test_weights_stay_away_and_the_model_is_the_same(offloaded, whole):
    assert all(on_meta(offloaded))
    assert offloaded.device == torch.device("cpu")
    assert offloaded.fingerprint == whole.fingerprint
    with torch.no_grad():
        logits = offloaded.forward(IDS, head=True).logits
        assert torch.equal(logits, whole.forward(IDS, head=True).logits)
    assert all(on_meta(offloaded))


def test_it_conforms(offloaded, whole):
    table = conformance(offloaded, IDS)
    assert table.passed.all()
    assert table.equals(conformance(whole, IDS))
    assert all(on_meta(offloaded))


def test_parts_of_layers_are_those_in_memory(offloaded, whole):
    x = torch.randn(5, models_zoo.HIDDEN, generator=torch.Generator().manual_seed(0))
    for layer, same in zip(offloaded.layers, whole.layers, strict=True):
        assert repr(layer) == repr(same)
        for name in ("num_experts", "hidden_size", "intermediate_size", "has_shared_expert"):
            assert getattr(layer, name) == getattr(same, name)
        routing, expected = layer.route(x), same.route(x)
        assert torch.equal(routing.logits, expected.logits)
        assert torch.equal(routing.experts, expected.experts)
        assert torch.equal(layer.router_weight, same.router_weight)
        assert torch.equal(layer.expert_outputs(x, [0, 7]), same.expert_outputs(x, [0, 7]))
        if layer.has_shared_expert:
            assert torch.equal(layer.shared_output(x), same.shared_output(x))
        weights = layer.expert_weights(3)
        for name, tensor in same.expert_weights(3).tensors().items():
            assert torch.equal(weights.tensors()[name], tensor)
    assert all(on_meta(offloaded))


def test_what_is_given_are_copies(offloaded, whole):
    layer = offloaded.layers[0]
    layer.expert_weights(3).down.zero_()
    assert torch.equal(layer.expert_weights(3).down, whole.layers[0].expert_weights(3).down)
    with pytest.raises(ModelError, match="cannot be changed: they are offloaded.*device_map"):
        layer.expert_tensors(3)


def test_experts_and_routing_can_be_changed_for_a_while(offloaded, whole):
    def outputs(model):
        layer = model.layers[0]
        with torch.no_grad(), layer.replacing(2, lambda original, x: 2 * original(x) - x):
            replaced = model.forward(IDS, head=True).logits
        with torch.no_grad(), layer.masking([1, 2]):
            masked = model.forward(IDS, head=True).logits
        with torch.no_grad(), layer.rerouting(lambda experts, weights: (experts, weights / 2)):
            rerouted = model.forward(IDS, head=True).logits
        return torch.stack([replaced, masked, rerouted, model.forward(IDS, head=True).logits])

    found = outputs(offloaded)
    assert torch.equal(found, outputs(whole))
    assert (found[:3] != found[3]).any(-1).any(-1).any(-1).all()
    assert all(on_meta(offloaded))


def test_a_capture_is_the_same(offloaded, whole, tmp_path):
    record = ("routing", "inputs", "residual", "token_loss")
    captures_zoo.record(tmp_path / "offloaded", offloaded, record=record)
    captures_zoo.record(tmp_path / "whole", whole, record=record)
    found, expected = (
        captures_zoo.contents(tmp_path / name / "capture") for name in ("offloaded", "whole")
    )
    assert found == expected


def test_the_files_go_away_with_the_model(folder, tmp_path):
    model = load(folder, device_map=DISK, offload_folder=tmp_path)
    kept = list(tmp_path.rglob("*.safetensors"))
    assert any("experts" in file.name for file in kept)
    del model
    gc.collect()
    assert not list(tmp_path.iterdir())


def test_broken_weights_on_disk_are_found(tmp_path):
    model = models_zoo.build("mixtral")
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[3, 4, 5] = torch.nan
    model.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"layers.1.mlp.experts.down_proj are not all finite"):
        load(tmp_path, device_map=DISK)


def test_half_precision_conforms_layer_by_layer(tmp_path):
    models_zoo.build("deepseek_v2").bfloat16().save_pretrained(tmp_path)
    model = load(tmp_path, device_map=DISK)
    table = conformance(model, IDS)
    assert table.passed.all()
    assert table.equals(conformance(load(tmp_path), IDS))
    assert all(on_meta(model))
    assert {parameter.dtype for parameter in model.model.parameters()} == {torch.bfloat16}


def test_weights_that_were_never_loaded_are_refused():
    with torch.device("meta"):
        model = models_zoo.build("mixtral")
    with pytest.raises(ModelError, match="never loaded"):
        load(model)
