"""Interventions in combination, their errors, and what they cost."""

import math
from contextlib import ExitStack
from functools import cache, partial

import pytest
import torch
from torch import nn

import models_zoo
from deviants_zoo import llama4, switch
from interventions_zoo import BUILDERS as ALL_FAMILIES
from moescope import interventions as change
from moescope.errors import ModelError, OptionError
from moescope.experts.adapter import Adapter
from moescope.models.discover import moe_layers
from moescope.models.load import load
from test_interventions_families import close, logits, observed, random_adapter

HIDDEN = models_zoo.HIDDEN
# Experts that are called with their routing, and blocks computed from their parts.
BUILDERS = {"mixtral": partial(models_zoo.build, "mixtral"), "llama4": partial(llama4)}
both_kinds = pytest.mark.parametrize("kind", BUILDERS)


@cache
def loaded(kind):
    return load(BUILDERS[kind]())


@cache
def mixtral(**changes):
    return load(models_zoo.build("mixtral", **changes))


def busiest(model, layer):
    return int(observed(model, layer).routing.experts.flatten().mode().values)


def outputs(model, layer, *contexts):
    """What the block returns within interventions, entered in the order given."""
    with ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        return observed(model, layer).output


@both_kinds
def test_the_later_one_changes_what_the_earlier_one_made(kind):
    model = loaded(kind)
    layer = model.layers[0]
    e = (layer, busiest(model, layer))
    value = torch.ones(HIDDEN)
    replaced, scaled = (
        partial(change.replace_output, e, value),
        partial(change.scale_expert, e, 3.0),
    )
    twice = outputs(model, layer, change.replace_output(e, 3 * value))
    assert close(outputs(model, layer, replaced(), scaled()), twice)
    once = outputs(model, layer, replaced())
    assert close(outputs(model, layer, scaled(), replaced()), once)

    # f(A1 x) inside, so f(A1(A2 x)).
    g = torch.Generator().manual_seed(0)
    first, second = (torch.randn(HIDDEN, HIDDEN, generator=g) / HIDDEN**0.5 for _ in range(2))
    adapters = [
        Adapter(weight=w, shift=torch.zeros(HIDDEN), form="linear") for w in (first, second)
    ]
    product = Adapter(weight=first @ second, shift=torch.zeros(HIDDEN), form="linear")
    nested = outputs(model, layer, *(change.insert_adapter(e, adapter) for adapter in adapters))
    assert close(nested, outputs(model, layer, change.insert_adapter(e, product)))


@both_kinds
def test_two_experts_stand_in_for_each_other(kind):
    model = loaded(kind)
    layer = model.layers[0]
    a = (layer, busiest(model, layer))
    b = (layer, (a[1] + 1) % layer.num_experts)
    swapped = outputs(model, layer, change.swap_experts(a, b))
    there_and_back = outputs(model, layer, change.substitute(a, b), change.substitute(b, a))
    assert close(there_and_back, swapped)
    alone = outputs(model, layer, change.substitute(a, b))
    assert close(
        outputs(model, layer, change.substitute(a, b), change.replace_output(a, 0.0)),
        outputs(model, layer, change.replace_output(a, 0.0)),
    )
    used = observed(model, layer).routing.experts
    unaffected = (used != b[1]).all(1)
    changed_target = outputs(model, layer, change.scale_expert(b, 7.0), change.substitute(a, b))
    assert close(changed_target[unaffected], alone[unaffected])


@both_kinds
def test_neurons_stay_ablated_whatever_is_around_them(kind):
    model = loaded(kind)
    layer = model.layers[0]
    e = (layer, busiest(model, layer))
    ablate = partial(change.ablate_neurons, e, [0, 1, 5])
    insert = partial(change.insert_adapter, e, random_adapter(HIDDEN))
    assert close(
        outputs(model, layer, ablate(), insert()), outputs(model, layer, insert(), ablate())
    )
    other = (layer, (e[1] + 1) % layer.num_experts)
    stand_in = outputs(model, layer, change.substitute(other, e), ablate())
    assert close(stand_in, outputs(model, layer, ablate(), change.substitute(other, e)))
    assert not close(stand_in, outputs(model, layer, change.substitute(other, e)))


@both_kinds
def test_what_is_done_to_a_position_stays_there_when_blocks_are_swapped(kind):
    model = loaded(kind)
    first, last = model.layers[0], model.layers[-1]
    swap = partial(change.swap_blocks, first, last)
    with swap():
        e = (first, busiest(model, first))
    for make in (
        partial(change.scale_expert, e, 3.0),
        partial(change.insert_adapter, e, random_adapter(HIDDEN)),
        partial(change.set_top_k, first, 1),
        partial(change.mask_experts, first, [e[1]]),
    ):
        expected = outputs(model, first, swap(), make())
        assert torch.equal(outputs(model, first, make(), swap()), expected)
        assert not torch.equal(expected, outputs(model, first, swap()))


def test_one_layer_is_changed_and_the_other_is_not():
    model = mixtral()
    first, last = model.layers
    with change.set_top_k(first, 1, "to_one"):
        seen = observed(model, first), observed(model, last)
    largest = seen[0].routing.weights.sort().values
    torch.testing.assert_close(largest, torch.tensor([0.0, 1.0]).expand_as(largest))
    assert (seen[1].routing.weights > 0).all()
    with change.set_top_k(model.layers, 0):
        assert (observed(model, last).output == 0).all()  # there is no shared expert


def test_weights_of_tokens_without_any_stay_zero():
    model = load(switch(expert_capacity=1))
    layer = model.layers[0]
    dropped = observed(model, layer).routing.experts[:, 0] < 0
    assert dropped.any()
    for weights in ("same_mass", "to_one"):
        with change.set_top_k(layer, 1, weights):
            seen = observed(model, layer)
        assert (seen.routing.weights[dropped] == 0).all()
        assert (seen.output[dropped] == 0).all()
    with change.set_top_k(layer, 1, "to_one"):
        assert (observed(model, layer).routing.weights[~dropped] == 1).all()


def test_a_top_k_sweep_leaves_no_trace_and_allocates_no_parameters():
    model = mixtral()
    parameters = [p.data_ptr() for p in model.model.parameters()]
    for k in range(3):
        with change.set_top_k(model.layers, k), change.swap_blocks(*model.layers):
            inside = [p.data_ptr() for p in model.model.parameters()]
            assert sorted(inside) == sorted(parameters)
    assert [p.data_ptr() for p in model.model.parameters()] == parameters


def test_experts_of_encoder_and_decoder_change_places():
    model = load(switch())
    encoder, decoder = model.layers[0], model.layers[-1]
    assert (encoder.stack, decoder.stack) == ("encoder", "decoder")
    here, there = encoder.expert_tensors(2), decoder.expert_tensors(5)
    before = [{name: t.clone() for name, t in of.items()} for of in (here, there)]
    with change.swap_experts((encoder, 2), (decoder, 5)):
        assert all(torch.equal(here[name], before[1][name]) for name in here)
        assert all(torch.equal(there[name], before[0][name]) for name in here)
        here["wi.weight"].add_(1)  # whoever trains them meanwhile
    assert all(torch.equal(here[name], before[0][name]) for name in here)
    assert all(torch.equal(there[name], before[1][name]) for name in here)


@both_kinds
def test_gradients_of_an_adapter_by_hand(kind):
    model = loaded(kind)
    layer, other = model.layers[0], model.layers[-1]
    plain = observed(model, layer)
    x, probe = plain.input, torch.randn(plain.input.shape, generator=torch.manual_seed(2))
    expert = busiest(model, layer)
    expected, given = (random_adapter(HIDDEN) for _ in range(2))
    for tensor in (*expected.tensors().values(), *given.tensors().values()):
        tensor.requires_grad_()
    tokens, slots = torch.where(plain.routing.experts == expert)
    function = lambda rows: other.expert_weights(3)(expected(rows))  # noqa: E731
    added = layer.weigh(function, x[tokens], plain.routing.weights[tokens, slots])
    (added * probe[tokens]).sum().backward()
    with change.substitute((layer, expert), (other, 3), given):
        output = layer.block(x[None])
    output = output[0] if isinstance(output, tuple) else output
    (output.reshape(x.shape) * probe).sum().backward(inputs=list(given.tensors().values()))
    for name, tensor in expected.tensors().items():
        torch.testing.assert_close(given.tensors()[name].grad, tensor.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adapters_of_another_dtype_are_welcome(dtype):
    model = load(models_zoo.build("mixtral").to(dtype))
    layer = model.layers[0]
    e = (layer, busiest(model, layer))
    plain = logits(model)
    ones, zeros = torch.ones(HIDDEN), torch.zeros(HIDDEN)
    assert plain.dtype == dtype
    with change.insert_adapter(e, Adapter(gain=ones, shift=zeros, form="scale")):
        inside = logits(model)
    assert inside.dtype == dtype
    assert (inside - plain).norm() < 0.02 * plain.norm()
    with change.replace_output(e, torch.ones(HIDDEN, dtype=torch.float64)):
        assert logits(model).dtype == dtype
    assert torch.equal(logits(model), plain)


def narrow():
    return mixtral(intermediate_size=8).layers[0]


REFUSED = {
    "no such expert": (
        lambda la: [
            change.mask_experts(la, [8]),
            change.swap_experts((la, 0), (la, 8)),
            change.substitute((la, -1), (la, 0)),
            change.substitute((la, 0), (la, 8)),
            change.scale_expert((la, 8), 1.0),
            change.replace_output((la, 8), 0.0),
            change.ablate_neurons((la, 8), [0]),
        ],
        "0 to 7",
    ),
    "no such neuron": (
        lambda la: [change.ablate_neurons((la, 0), [n]) for n in (-1, 16)],
        "0 to 15",
    ),
    "widths": (
        lambda la: [
            change.insert_adapter((la, 0), random_adapter(HIDDEN + 1)),
            change.replace_output((la, 0), torch.zeros(HIDDEN + 1)),
            change.substitute((la, 0), (mixtral(hidden_size=16).layers[0], 0)),
        ],
        "fit|width",
    ),
    "top_k": (lambda la: [change.set_top_k(la, k) for k in (-1, 3)], "0 to 2"),
    "too few left": (lambda la: [change.mask_experts(la, range(7))], "at most 6"),
    "other shapes": (
        lambda la: [
            change.swap_experts((la, 0), (narrow(), 0)),
            change.swap_blocks(la, narrow()),
            change.swap_blocks(la, mixtral(num_local_experts=4).layers[0]),
        ],
        "not built alike",
    ),
    "other nonlinearity": (
        lambda la: [
            change.swap_experts((la, 0), (mixtral(hidden_act="gelu").layers[0], 0)),
            change.swap_blocks(la, mixtral(hidden_act="gelu").layers[0]),
        ],
        "not built alike.*gelu|GELU",
    ),
    "other settings": (
        lambda la: [change.swap_blocks(la, mixtral(num_experts_per_tok=3).layers[0])],
        "top_k: 3. Expected: 2",
    ),
    "other kind": (
        lambda la: [change.swap_blocks(la, load(switch()).layers[0])],
        "not built alike",
    ),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_does_not_fit_is_refused_before_anything_runs(reason):
    model = mixtral()
    plain = logits(model)
    make, match = REFUSED[reason]
    for made in make(model.layers[0]):
        with pytest.raises(OptionError, match=match), made:
            pass
    assert torch.equal(logits(model), plain)


@pytest.mark.parametrize("family", ["switch_transformers", "nemotron_h", "mixtral"])
def test_support_tries_everything(family):
    model = load(ALL_FAMILIES[family]())
    table = change.support(model)
    assert list(table.columns) == ["intervention", "works", "reason", "change", "left"]
    assert table.works.all()
    assert (table.change > 1e-4).all()
    assert (table.left == 0).all()


def test_support_says_what_is_refused_and_why():
    model = load(models_zoo.build("mixtral", num_hidden_layers=1, num_local_experts=2))
    table = change.support(model).set_index("intervention")
    assert list(table.index[~table.works]) == ["mask_experts"]
    assert "at most 0" in table.reason["mask_experts"]
    assert math.isnan(table.change["mask_experts"])
    assert "swap_blocks" not in table.index


def test_two_masks_that_leave_too_few_say_so():
    model = mixtral()
    layer = model.layers[0]
    with (
        change.mask_experts(layer, range(4)),
        change.mask_experts(layer, range(4, 8)),
        pytest.raises(ModelError, match="masked"),
    ):
        logits(model)


def test_interventions_have_no_other_names():
    assert change.Expert
    with pytest.raises(AttributeError, match="mask"):
        change.mask  # noqa: B018


def test_quantised_weights_are_refused_where_they_would_be_written():
    model = models_zoo.build("mixtral")
    layer = load(model).layers[0]
    for name in ("gate_up_proj", "down_proj"):
        integers = layer.experts.get_parameter(name).to(torch.int8)
        setattr(layer.experts, name, nn.Parameter(integers, requires_grad=False))
    layer = moe_layers(model)[0]
    for made in (
        change.swap_experts((layer, 0), (layer, 1)),
        change.ablate_neurons((layer, 0), [0]),
    ):
        with pytest.raises(ModelError, match="quantised"), made:
            pass


def test_blocks_in_different_memory_are_refused():
    there = load(models_zoo.build("mixtral"))
    there.model.to("meta")
    with pytest.raises(ModelError, match="cpu, meta"):
        change.swap_blocks(mixtral().layers[0], there.layers[0]).__enter__()


@both_kinds
def test_outputs_of_an_expert_are_those_of_its_parameters(kind):
    model = loaded(kind)
    layer = model.layers[0]
    x = torch.randn(5, layer.hidden_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = layer.expert_outputs(x, [3])
        with change.scale_expert((layer, 3), 2.0), change.replace_output((layer, 3), 7.0):
            assert torch.equal(layer.expert_outputs(x, [3]), before)
        assert torch.equal(layer.expert_outputs(x, [3]), before)
