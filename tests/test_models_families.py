"""Every family: it is rebuilt, watched and changed, or refused for one reason."""

import re
from functools import cache, partial
from inspect import signature
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

import deviants_zoo
from families_zoo import FAMILIES, REFUSED, VOCABULARY, build, model_class
from moescope.errors import ConformanceError, ModelError
from moescope.models.conformance import conformance
from moescope.models.load import load
from moescope.models.observe import observe

LENGTHS = (13, 4, 9)
BUILDERS = {family: partial(build, family) for family in FAMILIES} | deviants_zoo.DEVIANTS
families = pytest.mark.parametrize("family", sorted(BUILDERS))

# No norm stands right before the block: it follows, or several streams are mixed into one.
WITHOUT_NORM_BEFORE = {"flex_olmo", "qwen4_exp_text"}
NOT_LANGUAGE_MODELS = {"vitpose_backbone"}


@cache
def loaded(family):
    return load(BUILDERS[family]())


def state(model):
    return {name: tensor.clone() for name, tensor in model.model.state_dict().items()}


def unchanged(model, before):
    after = model.model.state_dict()
    return all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def ids(rows=2, length=12):
    return torch.randint(VOCABULARY, (rows, length), generator=torch.manual_seed(1))


@torch.no_grad()
def outputs(model):
    """Logits, or what there is in models without a head."""
    return model.forward(ids(), head=True)[0]


def relative(one, other):
    return ((one - other).norm() / other.norm()).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@families
def test_conforms(family, dtype):
    model = loaded(family) if dtype == torch.float32 else load(BUILDERS[family]().to(dtype))
    mask = (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]).long()
    before = state(model)
    table = conformance(model, ids(*mask.shape) * mask, attention_mask=mask)
    assert table.passed.all()
    assert len(table) == len(model.layers)
    assert table.relative_error.max() <= 1e-6  # well within the tolerance
    assert unchanged(model, before)


@families
def test_observed_and_routed(family):
    model = loaded(family)
    seen = []
    with torch.no_grad(), observe(model.layers, seen.append, residual=True):
        model.forward(ids(rows=1))  # where capacity limits it, routing is that of a row
    assert [observation.layer for observation in seen] == model.layers
    for observation in seen:
        with torch.no_grad():
            routing = observation.layer.route(observation.input)
            after_norm = list(normed(observation))
        for name, tensor in vars(observation.routing).items():
            torch.testing.assert_close(getattr(routing, name), tensor)
        assert observation.output.norm() > 0
        if family in WITHOUT_NORM_BEFORE:
            assert torch.equal(observation.residual, observation.input)
        else:
            assert not torch.equal(observation.residual, observation.input)
            errors = [relative(tensor, observation.input) for tensor in after_norm]
            assert min(errors) <= 1e-6


def normed(observation):
    """What the norms of a decoder layer make of the residual stream."""
    for module in observation.layer.decoder_layer.modules():
        sizes = [parameter.shape for parameter in module.parameters()]
        named = "Norm" in type(module).__name__ and len(signature(module.forward).parameters) == 1
        if named and sizes[:1] == [observation.residual.shape[1:]]:
            yield module(observation.residual)


@families
def test_what_changes_nothing_and_what_does(family):
    model = loaded(family)
    first = model.layers[0]
    plain, before = outputs(model), state(model)

    for expert in (0, first.num_experts - 1):
        with first.replacing(expert, lambda original, x: original(x)):
            assert relative(outputs(model), plain) <= 1e-6
    with first.rerouting(lambda experts, weights: (experts, weights)):
        assert relative(outputs(model), plain) <= 1e-6
    with first.rerouting(without_first_slot):
        assert relative(outputs(model), plain) > 1e-3
    with first.replacing(first_used(first, model), lambda _, x: torch.zeros_like(x)):
        assert relative(outputs(model), plain) > 1e-3

    assert torch.equal(outputs(model), plain)
    assert unchanged(model, before)


def without_first_slot(experts, weights):
    return experts, torch.cat([torch.zeros_like(weights[:, :1]), weights[:, 1:]], 1)


@torch.no_grad()
def first_used(layer, model):
    seen = []
    with observe([layer], seen.append):
        model.forward(ids())
    return int(seen[0].routing.experts.max())


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("axk1", "AXK1MoE does more to the sum of its experts than multiply it"),
        ("inkling2_text", "nonlinearity of Inkling2Experts is none that moescope knows"),
        ("muse_spark_text", "experts of layer 0 work in a space of their own"),
        ("nllb-moe", "only experts 0 and 1 ever run"),
    ],
)
def test_refused(family, reason):
    assert family in REFUSED
    with pytest.raises(ModelError, match=reason):
        load(build(family))


def test_logits_that_are_not_linear_are_refused():
    with pytest.raises(ConformanceError, match="decoder layer 0 "):
        load(build("laguna", moe_router_logit_softcapping=1.0))


class NewRouter(nn.Linear):
    def forward(self, x):
        logits = super().forward(x)
        weights, experts = logits.softmax(1).topk(3)
        return logits, weights / weights.sum(1, keepdim=True), experts


class NewExperts(nn.Module):
    has_gate = False

    def __init__(self):
        super().__init__()
        self.up_proj = nn.Parameter(torch.randn(5, 24, 32) / 6)
        self.down_proj = nn.Parameter(torch.randn(5, 32, 24) / 6)
        self.act_fn = nn.GELU()

    def forward(self, x, experts, weights):
        wide = self.act_fn(torch.einsum("th,eih->tei", x, self.up_proj))
        all_outputs = torch.einsum("tei,ehi->teh", wide, self.down_proj)
        chosen = torch.take_along_dim(all_outputs, experts[..., None], 1)
        return (weights[..., None] * chosen).sum(1)


class NewBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.router = NewRouter(32, 5)
        self.experts = NewExperts()
        self.shared_part = nn.Linear(32, 32, bias=False)
        self.factor = 0.25

    def forward(self, x):
        rows = x.flatten(0, 1)
        _, weights, experts = self.router(rows)
        return (self.factor * self.experts(rows, experts, weights)).view_as(x) + self.shared_part(x)


def test_a_block_that_nobody_knows_is_understood():
    model = build("mixtral")
    for decoder_layer in model.model.layers:
        decoder_layer.mlp = NewBlock()
    layer = load(model).layers[0]
    with torch.no_grad():
        routing = layer.route(torch.randn(4, 32))
    torch.testing.assert_close(routing.weights.sum(1), torch.full((4,), 0.25))
    assert layer.expert_weights(4).activation == "gelu"
    assert (layer.num_experts, layer.top_k, layer.has_shared_expert) == (5, 3, True)


def test_what_is_added_without_being_an_expert_is_refused():
    model = build("mixtral")
    block = model.model.layers[1].mlp
    whole = block.forward
    block.forward = lambda x: whole(x) + 1e-3 * x
    with pytest.raises(ConformanceError, match="decoder layer 1 "):
        load(model)


@pytest.mark.parametrize("strategy", ["average", "sum"])
@pytest.mark.parametrize("shared", [0, 2])
def test_both_ways_to_combine_of_cohere2_conform(strategy, shared):
    changes = {"shared_expert_combination_strategy": strategy, "num_shared_experts": shared}
    layer = load(build("cohere2_moe", **changes)).layers[0]
    assert layer.has_shared_expert == bool(shared)


@pytest.mark.parametrize("family", ["beam", "laguna", "minimax_m3_vl_text"])
def test_weights_are_those_by_which_outputs_are_added(family):
    layer = loaded(family).layers[0]
    with torch.no_grad():
        routing = layer.route(torch.randn(5, layer.hidden_size))
    # 1.5 is what these blocks multiply the sum with; before, the weights sum to 1.
    torch.testing.assert_close(routing.weights.sum(1), torch.full((5,), 1.5))


def test_biases_that_the_block_holds_choose():
    x = torch.randn(64, 32)
    for family, bias in (
        ("afmoe", "expert_bias"),
        ("hy_v3", "e_score_correction_bias"),
        ("lfm2_moe", "expert_bias"),
        ("minimax_m2", "e_score_correction_bias"),
    ):
        layer = load(build(family)).layers[0]
        with torch.no_grad():
            getattr(layer.block, bias)[3] = 100
            assert (layer.route(x).experts == 3).any(1).all(), family


def test_no_family_is_forgotten():
    models = Path(transformers.__file__).parent / "models"
    with_experts = {
        file.parent.name
        for file in models.glob("*/modeling_*.py")
        if re.search(r"self\.experts\s*=", file.read_text(encoding="utf-8"))
    }
    classes = [model_class(family) for family in FAMILIES | REFUSED]
    classes += [type(loaded(family).model) for family in deviants_zoo.DEVIANTS]
    classes += [type(make()) for make in deviants_zoo.REFUSED.values()]
    known = {model_class.__module__.split(".")[2] for model_class in classes}
    assert with_experts - known == NOT_LANGUAGE_MODELS
