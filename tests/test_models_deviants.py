"""What holds for all families that do not follow the common pattern."""

from functools import cache

import pytest
import torch

from deviants_zoo import DEVIANTS, HIDDEN, NUM_EXPERTS, VOCABULARY, WIDTH
from moescope.errors import OptionError
from moescope.models.conformance import conformance
from moescope.models.load import load
from moescope.models.observe import observe

LENGTHS = (13, 4, 9)
SHARED = {"nemotron_h", "step3p7", "flint", "deepseek_v4", "llama4_text"} | {
    name for name in DEVIANTS if name.startswith("granite")
}
TOP_K = {"switch_transformers": 1, "longcat_flash": 4}
TOLERANCE = 1e-6


@cache
def loaded(family):
    """Shared by tests that leave it as it was."""
    return load(DEVIANTS[family]())


def unequal_rows():
    ids = torch.randint(1, VOCABULARY, (3, 13), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(13) < torch.tensor(LENGTHS)[:, None]
    return ids.masked_fill(~mask, 0), mask.long()


def ids_of(rows=1, length=24, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCABULARY, (rows, length), generator=generator)


def inputs(tokens=19):
    return torch.randn(tokens, HIDDEN, generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def watched(model, ids, **options):
    """Observations of all layers in order, and the logits."""
    seen = []
    with observe(model.layers, seen.append, **options):
        logits = model.forward(ids, head=True).logits
    return seen, logits


def error(one, other):
    return ((one - other).norm() / other.norm()).item()


def state(model):
    return {name: tensor.clone() for name, tensor in model.model.state_dict().items()}


def assert_untouched(model, before):
    after = model.model.state_dict()
    assert before.keys() == after.keys()
    assert all(tensor.equal(after[name]) for name, tensor in before.items())
    modules = list(model.model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in modules)
    assert not any("forward" in vars(module) for module in modules)


@torch.no_grad()
def by_hand(layer, x, experts, weights, functions=None):
    """What the block returns, one token and slot at a time, from the tensors of the experts."""
    shared = layer.shared_output(x) if layer.shared_in_block else None
    output = torch.zeros_like(x) if shared is None else shared.clone()
    for token, row in enumerate(experts.tolist()):
        for slot, expert in enumerate(row):
            if expert < 0:
                continue
            function = (functions or {}).get(expert, layer.expert_weights(expert))
            one = slice(token, token + 1)
            output[one] += layer.weigh(function, x[one], weights[one, slot])
    return output


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", DEVIANTS)
def test_conforms_with_masks_and_unequal_lengths(family, dtype):
    model = load(DEVIANTS[family]().to(dtype))
    ids, mask = unequal_rows()
    table = conformance(model, ids, attention_mask=mask)
    assert table.passed.all()
    assert table.relative_error.max() <= TOLERANCE
    assert {"step3p5": "step3p7"}.get(table.family[0], table.family[0]) == family
    for layer in model.layers:
        sizes = (layer.num_experts, layer.top_k, layer.hidden_size, layer.intermediate_size)
        assert sizes == (NUM_EXPERTS, TOP_K.get(family, 2), HIDDEN, WIDTH)
        assert layer.has_shared_expert == (family in SHARED)


@pytest.mark.parametrize("family", DEVIANTS)
def test_route_repeats_what_was_used(family):
    model = loaded(family)
    seen, _ = watched(model, ids_of())
    assert [o.layer for o in seen] == model.layers
    for observation in seen:
        with torch.no_grad():
            again = observation.layer.route(observation.input)
        assert again.experts.equal(observation.routing.experts)
        for name in ("weights", "logits"):
            assert error(getattr(again, name), getattr(observation.routing, name)) <= TOLERANCE


@pytest.mark.parametrize("family", DEVIANTS)
def test_experts_by_module_and_by_tensors_agree(family):
    layer, x = loaded(family).layers[-1], inputs()
    asked = [5, 0, 7, 5]
    with torch.no_grad():
        outputs = layer.expert_outputs(x, asked)
        for row, expert in enumerate(asked):
            assert error(layer.expert_weights(expert)(x), outputs[row]) <= TOLERANCE
        assert layer.expert_outputs(inputs(0), [1, 2]).shape == (2, 0, HIDDEN)
        assert layer.expert_outputs(x.double(), [1]).dtype == torch.float32
    assert not torch.allclose(outputs[0], outputs[1], atol=1e-2)
    for use in (layer.expert_weights, layer.expert_tensors, lambda e: layer.expert_outputs(x, [e])):
        with pytest.raises(OptionError, match="0 to 7"):
            use(NUM_EXPERTS)


@pytest.mark.parametrize("family", DEVIANTS)
def test_the_original_and_the_same_routing_change_nothing(family):
    model, ids = loaded(family), ids_of(2)
    before, weights = watched(model, ids), state(model)
    for layer in model.layers:
        used = before[0][model.layers.index(layer)].routing.experts
        expert = int(used[used >= 0].mode().values)
        for change in (
            layer.replacing(expert, lambda original, x: original(x)),
            layer.rerouting(lambda experts, weights: (experts, weights)),
        ):
            with change:
                seen, logits = watched(model, ids)
            assert error(logits, before[1]) <= TOLERANCE
            assert all(
                now.routing.experts.equal(then.routing.experts)
                for now, then in zip(seen, before[0], strict=True)
            )
    assert watched(model, ids)[1].equal(before[1])
    assert_untouched(model, weights)


@pytest.mark.parametrize("family", DEVIANTS)
def test_a_constant_in_place_of_an_expert_changes_exactly_its_tokens(family):
    model, ids = loaded(family), ids_of(2)
    layer = model.layers[0]
    before, weights = watched(model, ids)[0][0], state(model)
    experts, constant = before.routing.experts, torch.linspace(-1, 1, HIDDEN)
    expert = int(experts[experts >= 0].mode().values)
    given = []

    def replacement(_, x):
        given.append(x)
        return constant.expand_as(x)

    with layer.replacing(expert, replacement):
        after = watched(model, ids)[0][0]
    routed = (experts == expert).any(1)
    assert 0 < routed.sum() < len(routed)
    assert after.routing.experts.equal(experts)
    assert error(after.output[~routed], before.output[~routed]) <= TOLERANCE
    functions = {expert: lambda x: constant.expand_as(x)}
    expected = by_hand(layer, before.input, experts, before.routing.weights, functions)
    assert error(after.output, expected) <= TOLERANCE
    assert ((after.output - before.output).abs().amax(1) > 1e-3).equal(routed)
    assert sum(len(x) for x in given) == routed.sum()
    assert_untouched(model, weights)


@pytest.mark.parametrize("family", DEVIANTS)
def test_other_experts_and_weights_are_what_is_used_and_seen(family):
    model, ids = loaded(family), ids_of(2)
    layer = model.layers[-1]
    before, weights = watched(model, ids)[0][-1], state(model)
    with layer.rerouting(lambda experts, weights: ((experts + 1) % NUM_EXPERTS, weights / 2)):
        after = watched(model, ids)[0][-1]
    routing = after.routing
    used = before.routing.experts >= 0
    assert routing.experts[used].equal((before.routing.experts[used] + 1) % NUM_EXPERTS)
    assert torch.allclose(routing.weights, before.routing.weights / 2)
    expected = by_hand(layer, after.input, routing.experts, routing.weights)
    assert error(after.output, expected) <= TOLERANCE
    assert_untouched(model, weights)


@pytest.mark.parametrize("family", DEVIANTS)
def test_masked_experts_do_not_come_back(family):
    model, ids = loaded(family), ids_of(2)
    layer = model.layers[0]
    before, weights = watched(model, ids)[0][0], state(model)
    masked = before.routing.experts[before.routing.experts >= 0].unique()[:3].tolist()
    with layer.masking(masked):
        after = watched(model, ids)[0][0]
    experts = after.routing.experts
    assert not torch.isin(experts, torch.tensor(masked)).any()
    expected = by_hand(layer, after.input, experts, after.routing.weights)
    assert error(after.output, expected) <= TOLERANCE
    if family != "switch_transformers":  # where others have the capacity now
        kept = ~torch.isin(before.routing.experts, torch.tensor(masked)).any(1)
        assert experts[kept].sort(1).values.equal(before.routing.experts[kept].sort(1).values)
    with pytest.raises(OptionError, match="experts per token"), layer.masking(range(NUM_EXPERTS)):
        pass
    assert_untouched(model, weights)


@pytest.mark.parametrize("family", DEVIANTS)
@torch.no_grad()
def test_zeroing_the_tensors_of_an_expert_silences_it(family):
    layer, x = load(DEVIANTS[family]()).layers[0], inputs()
    before = layer.expert_outputs(x, [2, 3])
    tensors = layer.expert_tensors(2)
    assert sum(tensor.numel() for tensor in tensors.values()) in {
        matrices * WIDTH * wide for matrices in (2, 3) for wide in (HIDDEN, 24)
    }
    for tensor in tensors.values():
        tensor.zero_()
    after = layer.expert_outputs(x, [2, 3])
    assert before[0].abs().sum() > 0
    assert after[0].abs().sum() == 0
    assert after[1].equal(before[1])
    assert layer.expert_weights(2)(x).abs().sum() == 0
