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


_gelu_tanh = partial(functional.gelu, approximate="tanh")

ACTIVATIONS: dict[str, Activation] = {
    "gelu": functional.gelu,
    "gelu_new": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
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
