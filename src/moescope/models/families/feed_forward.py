"""A feed-forward network that is one module: a dense layer, or one expert in a list of them."""

from itertools import chain

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from moescope.errors import ModelError
from moescope.experts.weights import ExpertWeights
from moescope.models.families.gating import plain

_GATED = [  # gate, up, down
    ("gate_proj", "up_proj", "down_proj"),
    ("linear", "linear_v", "linear_1"),
    ("wi_0", "wi_1", "wo"),
]
_PLAIN = [  # up, down
    ("up_proj", "down_proj"),
    ("fc1", "fc2"),
    ("c_fc", "c_proj"),
    ("dense_h_to_4h", "dense_4h_to_h"),
    ("wi", "wo"),
]


def is_feed_forward(module: nn.Module) -> bool:
    """Whether a module is the matrices of one, by names in use, a nonlinearity, and no more."""
    return _matrices(module) is not None and _nonlinearity(module) is not None


def feed_forward_weights(module: nn.Module) -> ExpertWeights:
    """The tensors of one, detached: views of its parameters.

    Raises:
        ModelError: Its nonlinearity is none that `ExpertWeights` can express, or it is not one.
    """
    found, nonlinearity = _matrices(module), _nonlinearity(module)
    if found is None or nonlinearity is None:
        raise ModelError(
            f"{type(module).__name__} is no feed-forward network of a known kind",
            got=", ".join(name for name, _ in module.named_children()),
            expected=" or ".join(", ".join(names) for names in chain(_GATED, _PLAIN)),
        )
    *gate, up, down = [_linear(matrix) for matrix in found]
    act = plain(nn.ModuleDict({"act_fn": nonlinearity}))
    return ExpertWeights(
        gate[0][0] if gate else None,
        up[0],
        down[0],
        activation=act.activation,
        gate_bias=gate[0][1] if gate else None,
        up_bias=up[1],
        down_bias=down[1],
    )


def _matrices(module: nn.Module) -> list[nn.Module] | None:
    """Gate, if there is one, up and down."""
    children = {
        name: child
        for name, child in module.named_children()
        if isinstance(child, nn.Linear | Conv1D)
    }
    for names in chain(_GATED, _PLAIN):
        if children.keys() == set(names):
            return [children[name] for name in names]
    return None


def _nonlinearity(module: nn.Module) -> nn.Module | None:
    """The only other child, dropout aside, if there is one and it has no parameters."""
    others = [
        child
        for child in module.children()
        if not isinstance(child, nn.Linear | Conv1D | nn.Dropout)
    ]
    is_one = len(others) == 1 and next(others[0].parameters(), None) is None
    return others[0] if is_one else None


def _linear(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight [out, in] and bias."""
    weight = module.get_parameter("weight").detach()
    bias = dict(module.named_parameters()).get("bias")
    turned = weight.mT if isinstance(module, Conv1D) else weight
    return turned, None if bias is None else bias.detach()
