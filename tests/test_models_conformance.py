"""The gate: blocks are rebuilt from their parts, and whatever does not add up is caught."""

import pytest
import torch
from torch.nn.functional import softmax

from models_zoo import FAMILIES, VOCABULARY, build
from moescope.errors import ConformanceError
from moescope.experts.weights import ExpertWeights
from moescope.models.conformance import TOLERANCE, conformance
from moescope.models.discover import moe_layers
from moescope.models.families import registry
from moescope.models.families.fused import FusedLayer
from moescope.models.load import load
from moescope.models.view import MoEModel, Routing

COLUMNS = ["stack", "layer", "family", "max_abs_error", "relative_error", "passed"]
LENGTHS = (13, 4, 9)


def unequal_rows():
    ids = torch.randint(VOCABULARY, (len(LENGTHS), max(LENGTHS)))
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    return ids.masked_fill(~mask, 0), mask.long()


def unchecked(model):
    return MoEModel(model=model, tokenizer=None, layers=moe_layers(model), name="test")


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_conforms(family, dtype, implementation):
    model = load(build(family).to(dtype))
    model.model.set_experts_implementation(implementation)
    before = {name: tensor.clone() for name, tensor in model.model.state_dict().items()}
    ids, mask = unequal_rows()

    table = conformance(model, ids, attention_mask=mask)

    assert list(table.columns) == COLUMNS
    assert table.passed.all()
    assert table.relative_error.max() <= 1e-6  # well within the tolerance
    assert list(table.layer) == ([1, 2] if family.startswith("deepseek") else [0, 1])
    assert set(table.family) == {family}
    assert set(table["stack"]) == {"decoder"}
    after = model.model.state_dict()
    assert all(tensor.dtype == after[name].dtype for name, tensor in before.items())
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_does_not_count(family):
    model = load(build(family))
    ids, mask = unequal_rows()
    # What a row of nothing but padding computes is arbitrary, even NaN.
    ids = torch.cat([ids, torch.zeros_like(ids[:1])])
    mask = torch.cat([mask, torch.zeros_like(mask[:1])])
    assert conformance(model, ids, attention_mask=mask).passed.all()


@pytest.mark.parametrize("choice", ["greedy", "group_limited_greedy"])
def test_both_ways_of_choosing_of_deepseek_v2_conform(choice):
    load(build("deepseek_v2", topk_method=choice, n_group=4, topk_group=2))


def test_normalised_weights_conform():
    for family in ("qwen2_moe", "qwen3_moe", "olmoe"):
        load(build(family, norm_topk_prob=True))


class WithoutSharedExpert(FusedLayer):
    def shared_output(self, x):
        return None


class WithSwappedHalves(FusedLayer):
    def expert_weights(self, expert):
        right = super().expert_weights(expert)
        return ExpertWeights(right.up, right.gate, right.down)


class WithNeighbouringExpert(FusedLayer):
    def expert_outputs(self, x, experts):
        return super().expert_outputs(x, [(expert + 1) % 8 for expert in experts])


class WithProbabilitiesForLogits(FusedLayer):
    def router_logits(self, router_output):
        return softmax(router_output[0], dim=-1)


class WithAnotherRoute(FusedLayer):
    def route(self, x):
        right = super().route(x)
        return Routing(right.logits, right.weights.flip(1), right.experts)


class WithRenormalisedWeights(FusedLayer):
    def used_routing(self, experts_arguments):
        experts, weights = super().used_routing(experts_arguments)
        return experts, weights / weights.sum(-1, keepdim=True)


@pytest.mark.parametrize(
    "wrong",
    [
        WithoutSharedExpert,
        WithSwappedHalves,
        WithNeighbouringExpert,
        WithProbabilitiesForLogits,
        WithAnotherRoute,
        WithRenormalisedWeights,
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_wrong_family_is_refused_at_load(monkeypatch, wrong, dtype):
    families = {**registry.by_block_class(), "Qwen2MoeSparseMoeBlock": wrong}
    monkeypatch.setattr(registry, "_BY_BLOCK_CLASS", families)
    with pytest.raises(ConformanceError, match=r"decoder layer 0 .*qwen2_moe.*relative error 0?\d"):
        load(build("qwen2_moe").to(dtype))


def scaled(block):
    whole = block.forward
    block.forward = lambda hidden: whole(hidden) * 1.0001


def hooked(block):
    block.register_forward_hook(lambda _, __, output: output * 1.0001)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("alter", [scaled, hooked])
@pytest.mark.parametrize("family", FAMILIES)
def test_block_altered_after_loading_is_caught(family, alter, dtype):
    model = load(build(family).to(dtype))
    last = model.layers[-1]
    alter(last.block)
    table = conformance(model, unequal_rows()[0])
    assert list(table.passed) == [True, False]
    assert table.relative_error.iloc[-1] > TOLERANCE
    with pytest.raises(ConformanceError, match=f"decoder layer {last.index} "):
        load(model.model)


def test_another_activation_is_caught_after_loading_and_understood_before():
    model = load(build("mixtral"))
    model.layers[-1].experts.act_fn = torch.nn.GELU()
    assert list(conformance(model, unequal_rows()[0]).passed) == [True, False]
    assert load(model.model).layers[-1].expert_weights(0).activation == "gelu"


def test_nan_never_passes():
    model = load(build("mixtral"))
    hooked = model.layers[0].block.register_forward_hook(lambda _, __, output: output * torch.nan)
    table = conformance(model, unequal_rows()[0])
    hooked.remove()
    assert not table.passed.any()


def test_exchanged_block_is_caught():
    model = load(build("mixtral"))
    first, second = (layer.decoder_layer for layer in model.layers)
    first.mlp, second.mlp = second.mlp, first.mlp
    with pytest.raises(ConformanceError, match="taken the place"):
        conformance(model, unequal_rows()[0])


def test_block_that_is_not_run_is_caught():
    model = load(build("mixtral"))
    model.layers[1].decoder_layer.forward = lambda hidden_states, **_: hidden_states
    with pytest.raises(ConformanceError, match="does not run"):
        conformance(model, unequal_rows()[0])


def test_weights_come_back_after_an_error():
    model = unchecked(build("mixtral").to(torch.bfloat16))

    def fail(hidden):
        if hidden.dtype == torch.float32:
            raise RuntimeError("in the middle")
        return whole(hidden)

    block = model.layers[0].block
    whole, block.forward = block.forward, fail
    with pytest.raises(RuntimeError, match="in the middle"):
        conformance(model, unequal_rows()[0])
    assert {p.dtype for p in model.model.parameters()} == {torch.bfloat16}
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.model.modules())
