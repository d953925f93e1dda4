"""The nonlinearities of experts, by the names that model configurations use."""

from collections.abc import Callable
from functools import partial

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from moescope.errors import unknown

Activation = Callable[[Tensor], Tensor]


def _squared_relu(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    return functional.relu(x).square()


def _quick_gelu(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    return x * functional.sigmoid(1.702 * x)


_gelu_tanh = partial(functional.gelu, approximate="tanh")

ACTIVATIONS: dict[str, Activation] = {
    "gelu": functional.gelu,
    "gelu_new": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "quick_gelu": _quick_gelu,
    "relu": functional.relu,
    "relu2": _squared_relu,
    "silu": functional.silu,
    "swish": functional.silu,
}


def activation(name: str) -> Activation:
    """The elementwise function called `name` in model configurations (`hidden_act`).

    Raises:
        OptionError: There is no such activation.
    """
    if name not in ACTIVATIONS:
        raise unknown("activation", name, ACTIVATIONS)
    return ACTIVATIONS[name]


def neurons(
    first: Float[Tensor, "*shape"],
    up: Float[Tensor, "*shape"] | None,
    *,
    activation_name: str,
    limit: float | None,
    up_offset: float,
) -> Float[Tensor, "*shape"]:
    """What the neurons of an expert emit: act(gate) * (up + up_offset), or act(up) without gate.

    Args:
        first: What the activation is given: gate, or up where there is no gate.
        up: The other factor, if there is a gate.
        activation_name: Of the activation.
        limit: The gate is held below it, `up` between minus and plus it, both before all else.
        up_offset: Added to `up`.
    """
    act = activation(activation_name)
    if limit is not None:
        first = first.clamp(max=limit)
    if up is None:
        return act(first)
    if limit is not None:
        up = up.clamp(-limit, limit)
    return act(first) * (up + up_offset if up_offset else up)
