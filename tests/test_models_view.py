"""Layers and models as the rest of moescope sees them."""

import pytest
import torch

from models_zoo import FAMILIES, HIDDEN, NUM_EXPERTS, TOP_K, VOCABULARY, build
from moescope.errors import ModelError, OptionError
from moescope.models.families import fused, registry
from moescope.models.load import load
from moescope.models.observe import observe
from moescope.models.view import MoEModel


def inputs(tokens=23):
    return torch.randn(tokens, HIDDEN, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", FAMILIES)
def test_sizes(family):
    layer = load(build(family)).layers[-1]
    sizes = (layer.num_experts, layer.top_k, layer.hidden_size, layer.intermediate_size)
    assert sizes == (NUM_EXPERTS, TOP_K, HIDDEN, 16)
    assert layer.router_weight.shape == (NUM_EXPERTS, HIDDEN)
    assert layer.stack == "decoder"
    assert layer.family == family


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
@pytest.mark.parametrize("family", FAMILIES)
def test_expert_outputs_are_those_of_the_module_with_one_expert(
    family, implementation, monkeypatch
):
    model = load(build(family))
    model.model.set_experts_implementation(implementation)
    monkeypatch.setattr(fused, "_TOKENS_AT_ONCE", 7)
    layer, x = model.layers[0], inputs()
    asked = [5, 0, 5, 7]
    with torch.no_grad():
        outputs = layer.expert_outputs(x, asked)
        for row, expert in enumerate(asked):
            chosen = torch.full((len(x), 1), expert)
            expected = layer.experts(x, chosen, torch.ones(len(x), 1))
            torch.testing.assert_close(outputs[row], expected)
            torch.testing.assert_close(layer.expert_weights(expert)(x), expected)
    assert not torch.allclose(outputs[0], outputs[1], atol=1e-2)  # experts do differ


def test_rows_beyond_the_context_are_refused():
    model = load(build("mixtral"))
    assert model.context_length == 64
    model.forward(torch.zeros(2, 64, dtype=torch.long))
    with pytest.raises(ModelError, match=r"Got: 65\. Expected: at most 64"):
        model.forward(torch.zeros(2, 65, dtype=torch.long))


def test_no_tokens_and_no_experts():
    layer = load(build("mixtral")).layers[0]
    assert layer.expert_outputs(inputs(0), [1, 2]).shape == (2, 0, HIDDEN)
    assert layer.expert_outputs(inputs(), []).shape == (0, 23, HIDDEN)


@pytest.mark.parametrize("expert", [-1, NUM_EXPERTS])
def test_experts_that_do_not_exist(expert):
    layer = load(build("mixtral")).layers[0]
    with pytest.raises(OptionError, match="0 to 7"):
        layer.expert_outputs(inputs(), [0, expert])
    with pytest.raises(OptionError, match="0 to 7"):
        layer.expert_weights(expert)


def test_expert_weights_are_views():
    layer = load(build("qwen2_moe")).layers[0]
    weights = layer.expert_weights(3)
    assert weights.activation == "silu"
    assert not weights.up.requires_grad
    with torch.no_grad():
        layer.experts.gate_up_proj[3].zero_()
    assert weights.gate.abs().sum() == weights.up.abs().sum() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_route_repeats_what_the_model_did(family, dtype):
    model = load(build(family).to(dtype))
    seen = []
    with torch.no_grad(), observe(model.layers, seen.append):
        model.model(input_ids=torch.randint(VOCABULARY, (2, 9)))
    for observation in seen:
        routing = observation.layer.route(observation.input)
        for name, tensor in vars(observation.routing).items():
            assert torch.equal(getattr(routing, name), tensor), name


@pytest.mark.parametrize("family", FAMILIES)
def test_inputs_of_another_dtype_are_welcome(family):
    layer = load(build(family).to(torch.bfloat16)).layers[0]
    with torch.no_grad():
        assert layer.expert_outputs(inputs(), [0]).dtype == torch.bfloat16
        assert layer.route(inputs()).experts.shape == (23, TOP_K)
        shared = layer.shared_output(inputs())
    assert (shared is not None) == (family in {"qwen2_moe", "deepseek_v2", "deepseek_v3"})


def test_layer_by_the_models_own_number():
    model = load(build("deepseek_v3", num_hidden_layers=5, first_k_dense_replace=2))
    assert [layer.index for layer in model.layers] == [2, 3, 4]
    assert model.layer(3) is model.layers[1]
    with pytest.raises(OptionError, match="one of 2-4"):
        model.layer(0)
    gaps = load(build("qwen3_moe", num_hidden_layers=5, mlp_only_layers=[1]))
    with pytest.raises(OptionError, match="one of 0, 2-4"):
        gaps.layer(1)


def test_fingerprint_follows_the_weights(tmp_path):
    model = load(build("deepseek_v3"))
    first = model.fingerprint
    assert first == load(build("deepseek_v3")).fingerprint
    assert first != load(build("deepseek_v3", seed=1)).fingerprint
    assert first != load(build("deepseek_v3").to(torch.bfloat16)).fingerprint
    model.model.save_pretrained(tmp_path / "saved")
    assert load(tmp_path / "saved").fingerprint == first
    with torch.no_grad():
        model.layers[1].experts.down_proj[6] *= 1.01
    assert model.fingerprint != first
    assert load(build("deepseek_v3", routed_scaling_factor=2.0)).fingerprint != first


def test_representations():
    model = load(build("qwen2_moe"))
    assert "Qwen2MoeForCausalLM" in repr(model)
    assert "MoE layers 0-1" in repr(model)
    assert "8 experts, top-2" in repr(model.layers[0])
    hostile = MoEModel(model=model.model, tokenizer=None, layers=model.layers, name="<script>")
    assert "<script>" not in hostile._repr_html_()


def test_second_family_for_a_block_is_refused():
    first = registry.by_block_class()["Llama4TextMoe"]

    class Again(fused.FusedLayer):
        pass

    with pytest.raises(ModelError, match="Again"):
        registry.register("Llama4TextMoe")(Again)
    assert registry.by_block_class()["Llama4TextMoe"] is first


def test_expert_weights_are_reachable_from_the_room():
    from moescope import models
    from moescope.experts.weights import ExpertWeights

    assert models.ExpertWeights is ExpertWeights
    with pytest.raises(AttributeError, match="Expert"):
        _ = models.Expert
