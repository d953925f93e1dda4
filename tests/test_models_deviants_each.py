"""What is particular to each family that does not follow the common pattern."""

import pytest
import torch
from torch.nn.functional import relu

import deviants_zoo as zoo
from deviants_zoo import NUM_EXPERTS, REFUSED
from moescope.errors import ModelError
from moescope.models.conformance import conformance
from moescope.models.load import load
from test_models_deviants import TOLERANCE, error, ids_of, inputs, loaded, unequal_rows, watched


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("deepseek_v4", "layer 0 chooses experts by a table of token ids"),
        ("diffusion_gemma", "decodes a canvas of noise"),
        ("doge", "router mixes the tokens of a batch"),
        ("zaya", "router takes what the router of the layer before"),
    ],
)
def test_refused_with_one_reason(family, reason, dtype):
    with pytest.raises(ModelError, match=reason):
        load(REFUSED[family]().to(dtype))


def test_every_refused_family_is_tested():
    assert REFUSED.keys() == {"deepseek_v4", "diffusion_gemma", "doge", "zaya"}


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(build, id=name)
        for name, build in {
            "switch biased": lambda: zoo.switch(router_bias=True),
            "switch gelu": lambda: zoo.switch(dense_act_fn="gelu"),
            "switch bf16 router": lambda: zoo.switch(router_dtype="bfloat16"),
            "dbrx as they are": lambda: zoo.dbrx(moe_normalize_expert_weights=None),
            "dbrx to norm 2": lambda: zoo.dbrx(moe_normalize_expert_weights=2.0, moe_top_k=3),
            "jetmoe top-1": lambda: zoo.jetmoe(num_experts_per_tok=1),
            "longcat biased": lambda: zoo.longcat_flash(router_bias=True),
            "longcat all real": lambda: zoo.longcat_flash(zero_expert_num=0),
            "nemotron full size": lambda: zoo.nemotron_h(moe_latent_size=None),
            "nemotron unbiased": lambda: zoo.nemotron_h(mlp_bias=False),
            "granite unshared": lambda: zoo.granitemoeshared(shared_intermediate_size=0),
            "llama4 top-1": lambda: zoo.llama4(num_experts_per_tok=1),
            "llama4 half dense": lambda: zoo.llama4(interleave_moe_layer_step=2),
            "llama4 with images": zoo.llama4_with_images,
            "gemma4 with images": zoo.gemma4_with_images,
        }.items()
    ],
)
def test_variants_conform(model):
    ids, mask = unequal_rows()
    table = conformance(load(model()), ids, attention_mask=mask)
    assert table.relative_error.max() <= TOLERANCE


def test_switch_by_hand():
    model = loaded("switch_transformers")
    assert [(layer.stack, layer.index) for layer in model.layers] == [
        ("encoder", 1),
        ("encoder", 3),
        ("decoder", 1),
        ("decoder", 3),
    ]
    capacity, dropped_anywhere = 2, 0
    for observation in watched(model, ids_of(2, 12))[0]:
        block, routing = observation.layer.block, observation.routing
        taken = {}
        for token, x in enumerate(observation.input):
            scores = (block.router.classifier.weight.detach() @ x).softmax(0)
            place = (token // 12, int(scores.argmax()))  # rows do not compete for capacity
            taken[place] = taken.get(place, 0) + 1
            if taken[place] > capacity:
                dropped_anywhere += 1
                assert observation.output[token].abs().sum() == 0
                assert (routing.experts[token], routing.weights[token]) == (-1, 0)
                continue
            expert = getattr(block.experts, f"expert_{place[1]}")
            expected = scores.max() * (expert.wo.weight @ relu(expert.wi.weight @ x)).detach()
            assert error(observation.output[token], expected) <= TOLERANCE
            assert routing.experts[token] == place[1]
            torch.testing.assert_close(routing.weights[token], scores.max()[None])
        torch.testing.assert_close(
            routing.logits, observation.input @ block.router.classifier.weight.T
        )
    assert dropped_anywhere > 5


def test_switch_routes_what_it_is_given_as_one_row():
    layer = loaded("switch_transformers").layers[0]
    x = inputs(1).expand(5, -1)
    with torch.no_grad():
        routing = layer.route(x)
    assert (routing.experts[:, 0] >= 0).tolist() == [True, True, False, False, False]
    assert (routing.weights[:, 0] > 0).tolist() == [True, True, False, False, False]
    assert len(routing.logits) == 5


def test_experts_of_longcat_that_do_nothing():
    layer, x = loaded("longcat_flash").layers[0], inputs()
    for expert in range(NUM_EXPERTS - 3, NUM_EXPERTS):
        assert layer.expert_tensors(expert) == {}
        assert layer.expert_weights(expert)(x).equal(x)
        assert layer.expert_outputs(x, [expert])[0].equal(x)
    used = watched(loaded("longcat_flash"), ids_of())[0][0].routing.experts
    assert (used >= NUM_EXPERTS - 3).any()


def test_the_attention_of_jetmoe_is_not_taken_for_its_experts():
    model = loaded("jetmoe")
    blocks = [layer.mlp for layer in model.model.model.layers]
    assert [layer.block for layer in model.layers] == blocks
    bias = model.layers[0].shared_output(inputs(3))
    assert bias.equal(blocks[0].bias.expand(3, -1))
    assert blocks[0].bias.abs().sum() > 0


def test_the_shared_expert_of_granite_lies_beside_the_block():
    layer, x = loaded("granitemoeshared").layers[0], inputs()
    assert not layer.shared_in_block
    assert layer.shared_output(x).equal(layer.decoder_layer.shared_mlp(x))
    without = load(zoo.granitemoeshared(shared_intermediate_size=0)).layers[0]
    assert not without.has_shared_expert


@torch.no_grad()
def test_gemma4_reads_the_residual_by_two_norms():
    model = load(zoo.gemma4())
    decoder_layer = model.model.model.layers[0]
    seen = watched(model, ids_of(), residual=True)[0][0]
    assert decoder_layer.pre_feedforward_layernorm_2(seen.residual).equal(seen.input)
    probabilities, weights, experts = decoder_layer.router(seen.residual)
    assert error(seen.routing.logits.softmax(-1), probabilities) <= TOLERANCE
    assert experts.equal(seen.routing.experts)
    assert weights.equal(seen.routing.weights)
    assert error(seen.input @ model.layers[0].router_weight.T, seen.routing.logits) <= TOLERANCE


def test_dense_gemma4_is_dense():
    with pytest.raises(ModelError, match="dense model"):
        load(zoo.gemma4(enable_moe_block=False))


def test_limits_behind_the_nonlinearity_are_refused():
    load(zoo.step3p7(swiglu_limits=[0.0, 0.0], swiglu_limits_shared=[0.0, 5.0]))
    with pytest.raises(ModelError, match="nonlinearity of Step3p7Experts"):
        load(zoo.step3p7(swiglu_limits=[0.0, 7.0]))


@pytest.mark.parametrize(
    ("model", "loaded_class"),
    [
        (zoo.switch, "SwitchTransformersForConditionalGeneration"),
        (zoo.step3p7, "Step3p7ForConditionalGeneration"),
        (zoo.llama4_with_images, "Llama4ForCausalLM"),
        (zoo.dbrx, "DbrxForCausalLM"),
    ],
)
def test_checkpoints_are_read_by_the_class_that_they_need(model, loaded_class, tmp_path):
    original = load(model())
    original.model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert type(again.model).__name__ == loaded_class
    assert error(watched(again, ids_of())[1], watched(original, ids_of())[1]) <= TOLERANCE


@pytest.mark.parametrize(
    "family", ["switch_transformers", "nemotron_h", "granitemoeshared", "gemma4_text"]
)
@torch.no_grad()
def test_parts_outside_the_block_are_read_from_disk_too(family, tmp_path):
    whole = loaded(family)
    whole.model.save_pretrained(tmp_path)
    offloaded = load(tmp_path, device_map={"": "disk"})
    assert conformance(offloaded, ids_of(2)).relative_error.max() <= TOLERANCE
    for layer, same in zip(offloaded.layers, whole.layers, strict=True):
        assert repr(layer) == repr(same)
        assert layer.router_weight.equal(same.router_weight)
        assert layer.has_shared_expert == same.has_shared_expert
