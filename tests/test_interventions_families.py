"""Properties of interventions that hold for every family."""

from contextlib import ExitStack
from dataclasses import replace
from functools import cache
from itertools import product

import pytest
import torch

from families_zoo import VOCABULARY
from interventions_zoo import BUILDERS
from moescope import interventions as change
from moescope.errors import OptionError
from moescope.experts.adapter import Adapter
from moescope.models.load import load
from moescope.models.observe import observe

families = pytest.mark.parametrize("family", BUILDERS)
# Its router reads another norm of the residual than its experts; norms stay with their layer.
ROUTER_READS_MORE = {"gemma4_text"}
ROWS, LENGTH = 2, 5


@cache
def loaded(family):
    return load(BUILDERS[family]())


def ids(rows=ROWS, length=LENGTH):
    return torch.randint(VOCABULARY, (rows, length), generator=torch.manual_seed(1))


@torch.no_grad()
def logits(model, tokens=None):
    return model.forward(ids() if tokens is None else tokens, head=True)[0]


@torch.no_grad()
def observed(model, layer, tokens=None):
    seen = []
    with observe([layer], seen.append):
        logits(model, tokens)
    return seen[0]


def close(one, other):
    return (one - other).norm() <= 1e-6 * other.norm()


def identity(hidden, form="scale"):
    gain, shift = torch.ones(hidden), torch.zeros(hidden)
    if form == "linear":
        return Adapter(weight=torch.eye(hidden), shift=shift, form=form)
    return Adapter(gain=gain, shift=shift, form=form)


def random_adapter(hidden):
    g = torch.Generator().manual_seed(3)
    weight = torch.randn(hidden, hidden, generator=g) / hidden**0.5
    return Adapter(weight=weight, shift=0.1 * torch.randn(hidden, generator=g), form="linear")


def busiest(observation):
    """The expert with most tokens, and the one with the fewest (0 of few tokens)."""
    layer, routing = observation.layer, observation.routing
    counts = routing.experts[routing.weights != 0].bincount(minlength=layer.num_experts)
    order = [e for e in counts.argsort().tolist() if layer.expert_tensors(e)]
    return order[-1], order[0]


def expected_output(observation, functions=None, weights=None):
    """Block output written out, with other functions or weights than it had."""
    layer, routing, x = observation.layer, observation.routing, observation.input
    weights = routing.weights if weights is None else weights
    shared = layer.shared_output(x) if layer.shared_in_block else None
    output = torch.zeros_like(x) if shared is None else shared
    for expert in range(layer.num_experts):
        function = (functions or {}).get(expert, layer.expert_weights(expert))
        for slot in range(layer.top_k):
            mine = (routing.experts[:, slot] == expert) & (weights[:, slot] != 0)
            if mine.any():
                given = weights[mine, slot].to(x)
                output = output.index_put(
                    (mine,), output[mine] + layer.weigh(function, x[mine], given)
                )
    return output


def everything(model):
    """Each intervention by name, as a function that makes it; on the busiest experts."""
    first, last = model.layers[0], model.layers[-1]
    hidden = first.hidden_size
    a = (first, busiest(observed(model, first))[0])
    b = (last, busiest(observed(model, last))[1])
    return {
        "set_top_k": lambda: change.set_top_k(model.layers, first.top_k - 1, "same_mass"),
        "swap_experts": lambda: change.swap_experts(a, b),
        "swap_blocks": lambda: change.swap_blocks(first, last),
        "swap_blocks_experts": lambda: change.swap_blocks(first, last, experts_only=True),
        "substitute": lambda: change.substitute(a, b, random_adapter(hidden)),
        "insert_adapter": lambda: change.insert_adapter(a, random_adapter(hidden)),
        "scale_expert": lambda: change.scale_expert(a, 0.5),
        "replace_output": lambda: change.replace_output(a, torch.ones(hidden)),
        "ablate_neurons": lambda: change.ablate_neurons(a, range(0, first.intermediate_size, 2)),
        "mask_experts": lambda: change.mask_experts(first, [a[1]]),
    }


def state(model):
    """All that an intervention could leave behind."""
    modules = list(model.model.modules())
    return {
        "keys": list(model.model.state_dict()),
        "tensors": [id(p) for p in model.model.parameters()],
        "children": [[id(c) for c in module.children()] for module in modules],
        "forwards": [vars(module).get("forward") for module in modules],
        "hooks": [
            (len(module._forward_hooks), len(module._forward_pre_hooks)) for module in modules
        ],
    }


@families
def test_all_change_something_and_leave_nothing_behind(family):
    model = loaded(family)
    plain = logits(model)  # transformers keeps hooks from the first pass on
    before, numbers = state(model), [p.clone() for p in model.model.state_dict().values()]
    for name, make in everything(model).items():
        with make():
            assert not close(logits(model), plain), name
            assert list(model.model.state_dict()) == before["keys"]
        assert state(model) == before, name
    assert all(map(torch.equal, numbers, model.model.state_dict().values()))
    assert torch.equal(logits(model), plain)


@families
def test_all_at_once_and_nothing_is_left_after_errors(family):
    model = loaded(family)
    plain, before = logits(model), state(model)
    numbers = [p.clone() for p in model.model.state_dict().values()]

    def stop(observation):
        raise KeyboardInterrupt

    def interrupted():
        with ExitStack() as stack:
            for make in everything(model).values():
                stack.enter_context(make())
            assert not close(logits(model), plain)
            assert list(model.model.state_dict()) == before["keys"]
            with observe(model.layers[-1:], stop):
                logits(model)

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert state(model) == before
    assert all(map(torch.equal, numbers, model.model.state_dict().values()))
    assert torch.equal(logits(model), plain)


@families
def test_what_should_change_nothing(family):
    model = loaded(family)
    first, last = model.layers[0], model.layers[-1]
    plain = logits(model)
    a, b = (first, busiest(observed(model, first))[0]), (last, busiest(observed(model, last))[1])
    with change.swap_experts(a, b):
        assert not torch.equal(logits(model), plain)
        with change.swap_experts(a, b):
            assert torch.equal(logits(model), plain)
    for only in (False, True):
        with change.swap_blocks(first, last, only), change.swap_blocks(first, last, only):
            assert torch.equal(logits(model), plain)
    with change.set_top_k(model.layers, first.top_k):
        assert torch.equal(logits(model), plain)
    for form in ("scale", "linear"):
        with change.insert_adapter(a, identity(first.hidden_size, form)):
            assert close(logits(model), plain)
    with change.substitute(a, a), change.scale_expert(b, 1.0), change.ablate_neurons(a, []):
        assert close(logits(model), plain)
    with change.mask_experts(first, []):
        assert torch.equal(logits(model), plain)


@families
def test_what_is_done_to_an_unused_expert(family):
    model = loaded(family)
    layer, few = model.layers[0], ids(1, 2)
    plain = logits(model, few)
    unused = (layer, busiest(observed(model, layer, few))[1])
    assert (observed(model, layer, few).routing.experts != unused[1]).all()
    for made in (
        change.replace_output(unused, 1e3),
        change.scale_expert(unused, 1e3),
        change.insert_adapter(unused, random_adapter(layer.hidden_size)),
        change.substitute(unused, (model.layers[-1], 0)),
        change.ablate_neurons(unused, range(layer.intermediate_size)),
    ):
        with made:
            assert close(logits(model, few), plain)


@pytest.mark.parametrize("family", sorted(BUILDERS.keys() - ROUTER_READS_MORE))
def test_masking_an_expert_that_no_token_wants(family):
    model = loaded(family)
    for layer in model.layers:
        first = observed(model, layer)
        expert = busiest(first)[1]
        row = layer.router_weight[expert]
        original = row.clone()
        # All tokens give this expert the same, very low logit: no share of any softmax.
        x, wanted = first.input, torch.full((len(first.input), 1), -80.0)
        try:
            row.copy_(torch.linalg.lstsq(x.double(), wanted.double()).solution[:, 0])
            before = observed(model, layer)
            assert (before.routing.experts != expert).all()
            with change.mask_experts(layer, [expert]):
                after = observed(model, layer)
            assert torch.equal(after.routing.experts, before.routing.experts)
            assert close(after.output, before.output)
        finally:
            row.copy_(original)


@families
def test_masked_experts_are_not_chosen_and_other_choices_stay(family):
    model = loaded(family)
    layer = model.layers[0]
    before = observed(model, layer)
    expert = busiest(before)[0]
    with change.mask_experts(layer, [expert]):
        after = observed(model, layer)
    assert (after.routing.experts != expert).all()
    # Nor do dropped tokens count: capacity is spent in another way.
    unaffected = (before.routing.experts != expert).all(1) & (after.routing.experts >= 0).all(1)
    unaffected &= (before.routing.experts >= 0).all(1)
    old, new = (seen.routing.experts[unaffected].sort().values for seen in (before, after))
    assert torch.equal(old, new)
    with pytest.raises(OptionError, match="at most"):
        change.mask_experts(layer, range(layer.num_experts - layer.top_k + 1)).__enter__()


@families
def test_functions_of_experts_by_hand(family):
    model = loaded(family)
    layer, other = model.layers[0], model.layers[-1]
    plain = observed(model, layer)
    expert = busiest(plain)[0]
    own, there = layer.expert_weights(expert), other.expert_weights(1)
    adapter, value = random_adapter(layer.hidden_size), torch.arange(layer.hidden_size) / 10
    neurons = [0, 3]
    thinner = replace(own, down=own.down.clone())
    thinner.down[:, neurons] = 0
    a = (layer, expert)
    cases = [
        (change.scale_expert(a, -2.0), lambda x: -2 * own(x)),
        (change.replace_output(a, value), lambda x: value.expand_as(x)),
        (change.insert_adapter(a, adapter), lambda x: own(adapter(x))),
        (change.substitute(a, (other, 1), adapter), lambda x: there(adapter(x))),
        (change.substitute(a, (other, 1)), there),
        (change.ablate_neurons(a, neurons), thinner),
    ]
    for made, function in cases:
        with made:
            seen = observed(model, layer)
        assert torch.equal(seen.routing.experts, plain.routing.experts)
        assert torch.equal(seen.routing.weights, plain.routing.weights)
        assert close(seen.output, expected_output(plain, {expert: function}))
        assert not torch.allclose(seen.output, plain.output, atol=1e-3)


@families
def test_swapped_experts_by_hand(family):
    model = loaded(family)
    layer = model.layers[0]
    plain = observed(model, layer)
    one, other = busiest(plain)
    functions = {}
    for here, there in ((one, other), (other, one)):
        weights = layer.expert_weights(there)
        copies = {name: tensor.clone() for name, tensor in weights.tensors().items()}
        functions[here] = replace(weights, **copies)
    with change.swap_experts((layer, one), (layer, other)):
        seen = observed(model, layer)
    assert torch.equal(seen.routing.experts, plain.routing.experts)
    assert close(seen.output, expected_output(plain, functions))
    assert not torch.allclose(seen.output, plain.output, atol=1e-3)


@families
def test_scaling_by_zero_is_replacing_by_zero(family):
    model = loaded(family)
    layer = model.layers[0]
    expert = (layer, busiest(observed(model, layer))[0])
    with change.scale_expert(expert, 0.0):
        scaled = logits(model)
    with change.replace_output(expert, 0.0):
        assert torch.equal(logits(model), scaled)


@families
def test_fewer_experts_by_hand(family):
    model = loaded(family)
    layer = model.layers[0]
    plain = observed(model, layer)
    for k, weights in product(range(layer.top_k), ("as_is", "same_mass", "to_one")):
        kept = torch.zeros_like(plain.routing.weights)
        for token, row in enumerate(plain.routing.weights.tolist()):
            chosen = sorted(range(len(row)), key=row.__getitem__, reverse=True)[:k]
            mass = sum(row[slot] for slot in chosen)
            factor = {"as_is": 1, "same_mass": sum(row), "to_one": 1}[weights]
            for slot in chosen:
                share = row[slot] if weights == "as_is" else row[slot] / mass if mass else 0
                kept[token, slot] = factor * share
        with change.set_top_k(layer, k, weights):
            seen = observed(model, layer)
        assert torch.equal(seen.routing.experts, plain.routing.experts)
        torch.testing.assert_close(seen.routing.weights, kept)
        assert close(seen.output, expected_output(plain, weights=kept))


@families
def test_blocks_change_places(family):
    model = loaded(family)
    first, last = model.layers[0], model.layers[-1]
    x = observed(model, first).input
    there = last.block(x.view(ROWS, LENGTH, -1))
    there = (there[0] if isinstance(there, tuple) else there).reshape(x.shape)
    logits_there = last.route(x).logits
    seen = []
    # Observers before and inside see the position they were made for.
    with observe([first], seen.append), change.swap_blocks(first, last):
        inside = observed(model, first)
    for observation in (*seen, inside):
        assert observation.layer is first
        assert close(observation.input, x)
        if family not in ROUTER_READS_MORE:
            assert close(observation.output, there)
            torch.testing.assert_close(observation.routing.logits, logits_there)
    with change.swap_blocks(first, last, experts_only=True):
        inside = observed(model, first)
        expected = expected_output(inside)
    assert torch.equal(inside.routing.weights, observed(model, first).routing.weights)
    assert close(inside.output, expected)


@families
def test_gradients_reach_the_adapter_alone(family):
    model = loaded(family)
    layer, other = model.layers[0], model.layers[-1]
    source = (layer, busiest(observed(model, layer))[0])
    adapter = random_adapter(layer.hidden_size)
    for tensor in adapter.tensors().values():
        tensor.requires_grad_()
    model.model.requires_grad_(False)
    try:
        with change.substitute(source, (other, 1), adapter):
            model.forward(ids(), head=True)[0].square().sum().backward()
    finally:
        model.model.requires_grad_(True)
    assert all(tensor.grad.norm() > 0 for tensor in adapter.tensors().values())
    assert all(parameter.grad is None for parameter in model.model.parameters())
