"""Interventions that exchange whole sparse blocks."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain

from torch import Tensor, nn

from moescope.errors import ModelError, OptionError
from moescope.models.patching import noted
from moescope.models.view import MoELayer

_PLACE = "layer_"  # names of what says where a module stands, such as layer_idx


@contextmanager
def swap_blocks(a: MoELayer, b: MoELayer, experts_only: bool = False) -> Iterator[None]:
    """Exchange router, experts and shared expert of two layers, or the experts only (MoE Align).

    Parameters and buffers change places, nothing is copied and no module moves. So everything
    tied to a position stays there: layers, observers and other interventions, entered before or
    after, act on what runs at their position, and modules know their layer number. Only what is
    written into parameters before (`swap_experts`, `ablate_neurons`) travels with them.

    Raises:
        OptionError: The blocks are not built alike.
        ModelError: The weights are offloaded, or the blocks lie on different devices.
    """
    pairs = _pairs(a, b)
    for one, other in pairs:
        _check_alike(one, other)
    rows = _expert_rows(a) if experts_only else None
    with ExitStack() as stack:
        for one, other in pairs:
            for name, tensor in _own_tensors(one).items():
                if rows is None or _holds(tensor, rows):
                    stack.enter_context(_exchanged(one, other, name))
        with noted(a.block), noted(b.block):
            yield


def _pairs(a: MoELayer, b: MoELayer) -> list[tuple[nn.Module, nn.Module]]:
    """All modules of both layers that are exchanged, paired.

    Raises:
        OptionError: They are not the same modules.
    """
    ones, others = _modules(a), _modules(b)
    kinds = [{name: type(module).__name__ for name, module in of.items()} for of in (ones, others)]
    if kinds[0] != kinds[1]:
        name = next(iter(set(kinds[0].items()) ^ set(kinds[1].items())))[0]
        raise OptionError(
            f"the blocks of layers {a.index} and {b.index} are not built alike",
            got=f"{name or 'block'}: {kinds[1].get(name)}",
            expected=kinds[0].get(name),
        )
    return [(module, others[name]) for name, module in ones.items()]


def _modules(layer: MoELayer) -> dict[str, nn.Module]:
    modules = dict(layer.block.named_modules())
    if not layer.shared_in_block:
        for name, child in layer.decoder_layer.named_children():
            if name.startswith("shared_"):
                modules |= {f"{name}.{inner}": module for inner, module in child.named_modules()}
    return modules


def _own_tensors(module: nn.Module) -> dict[str, Tensor]:
    own = chain(module.named_parameters(recurse=False), module.named_buffers(recurse=False))
    return dict(own)


def _check_alike(one: nn.Module, other: nn.Module) -> None:
    """Refuse two modules that do different things with the same tensors.

    Raises:
        OptionError: They have other settings, or tensors of other shapes.
        ModelError: Their tensors are not in the same memory.
    """
    facts, others = _facts(one), _facts(other)
    if facts != others:
        name = next(n for n in (facts | others) if facts.get(n) != others.get(n))
        raise OptionError(
            f"two modules {type(one).__name__} are not built alike",
            got=f"{name}: {others.get(name)}",
            expected=facts.get(name),
        )
    devices = {str(t.device) for module in (one, other) for t in _own_tensors(module).values()}
    if len(devices) > 1 or "meta" in devices:
        raise ModelError(
            "blocks can be exchanged only where both are in the memory of one device",
            got=", ".join(sorted(devices)),
            remedy="Choose a device_map that puts them there",
        )


def _facts(module: nn.Module) -> dict[str, object]:
    """Settings of a module, and shapes and dtypes of its tensors."""
    settings: dict[str, object] = {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, bool | int | float | str) and not name.startswith(("_", _PLACE))
    }
    tensors = _own_tensors(module)
    return settings | {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}


def _expert_rows(layer: MoELayer) -> set[int]:
    """Where in memory the parameters of each expert begin."""
    return {
        tensor.data_ptr()
        for expert in range(layer.num_experts)
        for tensor in layer.expert_tensors(expert).values()
    }


def _holds(tensor: Tensor, rows: set[int]) -> bool:
    begin = tensor.data_ptr()
    return any(begin <= row < begin + tensor.nbytes for row in rows)


@contextmanager
def _exchanged(one: nn.Module, other: nn.Module, name: str) -> Iterator[None]:
    first, second = _own_tensors(one)[name], _own_tensors(other)[name]
    setattr(one, name, second)
    setattr(other, name, first)
    try:
        yield
    finally:
        setattr(one, name, first)
        setattr(other, name, second)
