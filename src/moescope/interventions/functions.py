"""Interventions on what one expert computes: its parameters and the routing stay what they are.

An expert computes `function(x)`. In most families the weight of the router scales what comes out;
where it scales what goes in (Llama 4), x is the scaled input here too.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from jaxtyping import Float
from torch import Tensor

from moescope.errors import OptionError
from moescope.experts.adapter import Adapter
from moescope.experts.weights import ExpertWeights
from moescope.models.view import Function, MoELayer, Replacement

Expert = tuple[MoELayer, int]
"""A layer and the number of one of its experts."""


@contextmanager
def substitute(
    source: Expert, target: Expert | ExpertWeights | None, adapter: Adapter | None = None
) -> Iterator[None]:
    """Have tokens that are routed to `source` computed by `target`: f_target(A(x)) (MoE Align).

    The target is what its parameters say: if its own function is changed too, that is for the
    tokens routed to it, so that two experts can stand in for each other. The source as target
    keeps what was changed about it before.

    Args:
        source: Whose tokens.
        target: Who computes them: an expert of any layer, also the source itself; weights that
            belong to no model, on the device of the source; or None: A(x) alone, no expert.
        adapter: A, of the width of the model, on any device, in any dtype; its tensors may
            require gradients. None for none.

    Raises:
        OptionError: There is no such expert, or widths do not fit.
    """
    width = source[0].hidden_size
    adapt = _adapting(adapter, width)
    function: Replacement = lambda _, x: adapt(x)  # noqa: E731
    if isinstance(target, ExpertWeights):
        _require_width(target.hidden_size, width)
        weights = target
        function = lambda _, x: weights(adapt(x).to(weights.up)).to(x)  # noqa: E731
    elif target is not None:
        layer, number = target
        layer.check_experts([number])
        _require_width(layer.hidden_size, width)
        function = lambda _, x: layer.expert_outputs(adapt(x), [number])[0]  # noqa: E731
        if source[0] is layer and source[1] == number:
            function = lambda before, x: before(adapt(x))  # noqa: E731
    with _changed(source, function):
        yield


def insert_adapter(expert: Expert, adapter: Adapter) -> AbstractContextManager[None]:
    """Have an expert compute f(A(x)).

    Raises:
        OptionError: There is no such expert, or the adapter is not of the width of the model.
    """
    return substitute(expert, expert, adapter)


def scale_expert(expert: Expert, factor: float) -> AbstractContextManager[None]:
    """Have an expert compute factor * f(x).

    Raises:
        OptionError: There is no such expert.
    """
    return _changed(expert, lambda function, x: factor * function(x))


@contextmanager
def replace_output(expert: Expert, value: Float[Tensor, " hidden"] | float) -> Iterator[None]:
    """Have an expert compute the same for all tokens: its mean (mean ablation), or 0.

    Args:
        expert: The expert.
        value: What it computes, before the weight of the router; a number for all dimensions.

    Raises:
        OptionError: There is no such expert, or the value is not of the width of the model.
    """
    width = expert[0].hidden_size
    if isinstance(value, Tensor) and value.shape != (width,):
        raise OptionError("the value does not fit", got=tuple(value.shape), expected=(width,))

    fixed = torch.as_tensor(value)
    with _changed(expert, lambda _, x: fixed.to(x).expand_as(x)):
        yield


def _require_width(got: int, expected: int) -> None:
    if got != expected:
        raise OptionError("source and target are not of the same width", got=got, expected=expected)


def _changed(expert: Expert, function: Replacement) -> AbstractContextManager[None]:
    layer, number = expert
    return layer.replacing(number, function)


def _adapting(adapter: Adapter | None, width: int) -> Function:
    """The adapter as a function of inputs of any dtype on any device."""
    if adapter is None or not adapter.tensors():
        return lambda x: x
    shift = adapter.tensors()["shift"]
    if len(shift) != width:
        raise OptionError("the adapter does not fit the model", got=len(shift), expected=width)
    # What is trained meanwhile must be moved at every call.
    return lambda x: adapter.to(device=x.device)(x.to(shift.dtype)).to(x.dtype)
