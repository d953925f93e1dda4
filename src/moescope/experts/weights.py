"""One expert: a gated or plain two-layer feed-forward network, as tensors."""

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import linear

from moescope.errors import AlignmentError
from moescope.experts.activations import activation, neurons


@dataclass(frozen=True, eq=False)
class ExpertWeights:
    """`f(x) = down(act(gate x) * up x)`, or `down(act(up x))` where there is no gate.

    In some families gate and up are held within limits and a number is added to up: see
    `moescope.experts.activations.neurons`. Matrices have the layout of `nn.Linear`: [out, in].

    Raises:
        AlignmentError: The matrices do not fit one another.
        OptionError: The activation is unknown.
    """

    gate: Float[Tensor, "..."] | None
    """[intermediate, hidden], or None for an expert without gate."""
    up: Float[Tensor, "..."]
    """[intermediate, hidden]."""
    down: Float[Tensor, "..."]
    """[hidden, intermediate]."""
    activation: str = "silu"
    """Name of the nonlinearity, as in model configurations."""
    gate_bias: Float[Tensor, "..."] | None = None
    """[intermediate]."""
    up_bias: Float[Tensor, "..."] | None = None
    """[intermediate]."""
    down_bias: Float[Tensor, "..."] | None = None
    """[hidden]."""
    limit: float | None = None
    """Bound on what the nonlinearity is given."""
    up_offset: float = 0.0
    """Added to up."""

    def __post_init__(self) -> None:
        activation(self.activation)
        if self.up.ndim != 2:
            raise AlignmentError(
                "`up` is not a matrix", got=tuple(self.up.shape), expected="[intermediate, hidden]"
            )
        wide, hidden = self.up.shape
        expected = {
            "gate": (wide, hidden),
            "down": (hidden, wide),
            "gate_bias": (wide,),
            "up_bias": (wide,),
            "down_bias": (hidden,),
        }
        for name, tensor in self.tensors().items():
            shape = expected.get(name, (wide, hidden))
            if tuple(tensor.shape) != shape:
                raise AlignmentError(
                    f"`{name}` does not fit `up`", got=tuple(tensor.shape), expected=shape
                )

    def __call__(self, x: Float[Tensor, "tokens hidden"]) -> Float[Tensor, "tokens hidden"]:
        """Outputs of the expert, in the dtype of its weights.

        Raises:
            AlignmentError: The inputs have another hidden size.
        """
        if x.shape[-1] != self.hidden_size:
            raise AlignmentError(
                "inputs do not fit the expert", got=tuple(x.shape), expected=(-1, self.hidden_size)
            )
        up = linear(x, self.up, self.up_bias)  # [tokens, intermediate]
        gate = None if self.gate is None else linear(x, self.gate, self.gate_bias)
        first, second = (up, None) if gate is None else (gate, up)
        wide = neurons(
            first,
            second,
            activation_name=self.activation,
            limit=self.limit,
            up_offset=self.up_offset,
        )
        return linear(wide, self.down, self.down_bias)

    @property
    def hidden_size(self) -> int:
        """Width of inputs and outputs."""
        return self.up.shape[1]

    @property
    def intermediate_size(self) -> int:
        """Number of neurons."""
        return self.up.shape[0]

    @property
    def num_parameters(self) -> int:
        """Number of weights and biases."""
        return sum(tensor.numel() for tensor in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """The weights and biases there are, by name."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    def to(
        self, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> "ExpertWeights":
        """The same expert with its tensors in another dtype or on another device."""
        moved: dict[str, Any] = {
            name: tensor.detach().to(dtype=dtype or tensor.dtype, device=device or tensor.device)
            for name, tensor in self.tensors().items()
        }
        return replace(self, **moved)
