"""Quantised models: torchao int8, weights only, on the CPU."""

import pytest
import torch
from torch import nn

import captures_zoo
import deviants_zoo
import models_zoo
from moescope.errors import ModelError
from moescope.models.conformance import conformance
from moescope.models.load import load
from moescope.models.quantised import QuantisedLayer
from moescope.surgery.experts import exchange_experts, keep_experts, permute_experts

torchao = pytest.importorskip("torchao.quantization", reason="torchao is optional")
IDS = torch.arange(3, 35).reshape(2, 16)


def quantised(network):
    """All linear layers but routers; stacked experts are none, lists of experts are."""

    def chosen(module, path):
        return isinstance(module, nn.Linear) and not path.endswith("classifier")

    torchao.quantize_(network, torchao.Int8WeightOnlyConfig(version=2), filter_fn=chosen)
    return load(network)


@pytest.fixture(scope="module")
def switch():
    return quantised(deviants_zoo.DEVIANTS["switch_transformers"]())


def test_experts_and_routing_work_by_calling_modules(switch):
    assert all(isinstance(layer, QuantisedLayer) for layer in switch.layers)
    assert conformance(switch, IDS).passed.all()
    layer = switch.layers[0]
    x = torch.randn(5, layer.hidden_size, generator=torch.Generator().manual_seed(0))
    expected = torch.stack([expert(x) for expert in layer.block.experts.values()])
    assert torch.equal(layer.expert_outputs(x, range(layer.num_experts)), expected)
    exact = load(deviants_zoo.DEVIANTS["switch_transformers"]()).layers[0]
    error = (expected - exact.expert_outputs(x, range(layer.num_experts))).norm()
    assert 1e-4 < error / expected.norm() < 2e-2
    assert layer.route(x).experts.shape == (5, 1)


def test_a_quantised_model_is_captured(switch, tmp_path):
    recorded = captures_zoo.record(tmp_path, switch, record=("routing", "inputs"))
    assert recorded.model_fingerprint == switch.fingerprint
    exact = load(deviants_zoo.DEVIANTS["switch_transformers"]())
    assert switch.fingerprint != exact.fingerprint


@pytest.mark.parametrize(
    "act",
    [
        lambda m: m.layers[0].expert_weights(0),
        lambda m: m.layers[0].expert_tensors(0),
        lambda m: exchange_experts((m.layers[0], 0), (m.layers[1], 1)),
        lambda m: permute_experts(m, {m.layers[0]: range(8)}),
        lambda m: keep_experts(m, {layer: range(4) for layer in m.layers}),
    ],
)
def test_weights_are_neither_read_nor_changed(switch, act):
    before = switch.fingerprint
    with pytest.raises(ModelError, match="are quantised: they can be called, but neither read"):
        act(switch)
    assert switch.fingerprint == before


def test_plain_experts_beside_quantised_layers_are_plain():
    """Stacked experts are no linear layers; the shared expert and attention are."""
    seen = quantised(models_zoo.build("qwen2_moe"))
    exact = load(models_zoo.build("qwen2_moe"))
    assert conformance(seen, IDS).passed.all()
    weights, expected = (m.layers[0].expert_weights(3).down for m in (seen, exact))
    assert torch.equal(weights, expected)
    x = torch.randn(5, models_zoo.HIDDEN, generator=torch.Generator().manual_seed(0))
    shared, before = (m.layers[0].shared_output(x) for m in (seen, exact))
    assert not torch.equal(shared, before)
    exchange_experts((seen.layers[0], 0), (seen.layers[1], 1))


def test_half_precision_cannot_be_upcast_and_is_compared_as_it_is():
    network = models_zoo.build("qwen2_moe").to(torch.bfloat16)
    seen = quantised(network)
    table = conformance(seen, IDS)
    assert table.passed.all()
    assert table.relative_error.between(1e-5, 1e-2).all()
    whole = seen.layers[1].block.forward
    seen.layers[1].block.forward = lambda hidden: whole(hidden) * 1.05
    assert list(conformance(seen, IDS).passed) == [True, False]
