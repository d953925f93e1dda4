"""Experts put into another order, exchanged, or taken out."""

from collections.abc import Mapping, Sequence

from moescope.errors import ModelError, OptionError
from moescope.models.alike import require_alike
from moescope.models.view import MoELayer, MoEModel
from moescope.surgery.blueprint import Blueprint
from moescope.surgery.groups import require_groups
from moescope.surgery.selection import select


def permute_experts(model: MoEModel, orders: Mapping[MoELayer, Sequence[int]]) -> None:
    """Put the experts of some layers into another order, with what the router knows of them.

    What the model computes stays the same, up to the order of sums.

    Args:
        model: The model.
        orders: For each layer, the numbers that its experts have now, in their new order.

    Raises:
        OptionError: Not an order of all experts of a layer of the model, or one that tears a
            group of experts apart, in families that choose groups first.
        ModelError: The weights are not plain numbers in memory (quantised, offloaded), or the
            router would choose otherwise. The model is as before.
    """
    _require_layers(model, orders)
    for layer, order in orders.items():
        if sorted(order) != list(range(layer.num_experts)):
            raise OptionError(
                f"not an order of all experts of layer {layer.index}",
                got=list(order),
                expected=f"0 to {layer.num_experts - 1}, each once",
            )
        require_groups(layer, order)
    num_experts = _num_experts(model)
    # Any other number shows where experts lie; twice as many fit all limits and groups.
    blueprint = Blueprint.draw(model.model, num_experts, 2 * num_experts)
    select(model, blueprint, orders)


def keep_experts(model: MoEModel, kept: Mapping[MoELayer, Sequence[int]]) -> None:
    """Take all experts but some out of every layer, in place; tokens go to the best of the rest.

    Routers, biases and every number of experts, that of the configuration included, follow. While
    it works, the former weights are in memory beside the new ones.

    Args:
        model: The model.
        kept: For every layer of the model the numbers of its experts that stay, in the order that
            they get; equally many everywhere, since configurations know one number for all.

    Raises:
        OptionError: A layer is missing or strange; experts do not exist or are named twice; their
            number differs between layers, or is too small for the router or its groups.
        ModelError: The weights are not plain numbers in memory (quantised, offloaded), the
            configuration does not say how many experts there are, or something else depends on
            that number. The model is as before.
    """
    _require_layers(model, kept)
    num_experts = _num_experts(model)
    missing = [layer.index for layer in model.layers if layer not in kept]
    sizes = {len(set(experts)) for experts in kept.values()}
    if missing or len(sizes) != 1:
        raise OptionError(
            "every layer keeps the same number of experts",
            got=f"no experts for layers {missing}" if missing else f"{sorted(sizes)} experts",
            expected="the same number in each layer of the model",
        )
    (wanted,) = sizes
    for layer, experts in kept.items():
        layer.check_experts(experts)
        if len(set(experts)) != len(experts):
            raise OptionError(f"an expert of layer {layer.index} is named twice", got=experts)
        if wanted < layer.top_k:
            raise OptionError(
                f"layer {layer.index} chooses {layer.top_k} experts per token",
                got=f"{wanted} kept",
                expected=f"at least {layer.top_k}",
            )
    if wanted == num_experts:
        permute_experts(model, kept)
        return
    for layer, experts in kept.items():
        require_groups(layer, experts)
    select(model, Blueprint.draw(model.model, num_experts, wanted), kept)


def exchange_experts(a: tuple[MoELayer, int], b: tuple[MoELayer, int]) -> None:
    """Exchange the parameters of two experts of one layer or of two; routers stay.

    Raises:
        OptionError: There is no such expert, or the two are not built alike.
        ModelError: The weights are not plain numbers in memory (quantised, offloaded).
    """
    one, other = (layer.expert_tensors(expert) for layer, expert in (a, b))
    require_alike(a, b)
    for name, tensor in one.items():
        former = tensor.clone()
        tensor.copy_(other[name])
        other[name].copy_(former)


def _require_layers(model: MoEModel, chosen: Mapping[MoELayer, Sequence[int]]) -> None:
    for layer in chosen:
        if layer not in model.layers:
            raise OptionError(f"{layer!r} is no layer of {model.name}")


def _num_experts(model: MoEModel) -> int:
    numbers = {layer.num_experts for layer in model.layers}
    if len(numbers) > 1:
        raise ModelError(
            f"layers of {model.name} have different numbers of experts", got=sorted(numbers)
        )
    for layer in model.layers:
        layer.expert_tensors(0)  # refuses what is not plain numbers in memory
    return numbers.pop()
