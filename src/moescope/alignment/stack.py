"""Several experts, or several adapters, of one shape as one batch of matrix products."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import layer_norm

from moescope.experts.activations import activation
from moescope.experts.adapter import Adapter
from moescope.experts.weights import ExpertWeights


def same_shape(experts: Sequence[ExpertWeights]) -> list[list[int]]:
    """Group experts that can be stacked; indices in order of first appearance."""
    groups: dict[tuple[object, ...], list[int]] = {}
    for i, expert in enumerate(experts):
        key = (expert.intermediate_size, expert.activation, *sorted(expert.tensors()))
        groups.setdefault(key, []).append(i)
    return list(groups.values())


@dataclass(frozen=True, eq=False)
class ExpertStack:
    """Experts of one shape, in fp32, callable on a batch of inputs for each of them."""

    gate: Float[Tensor, "..."] | None
    """[fits, hidden, intermediate]: transposed against `ExpertWeights`, as `bmm` wants it."""
    up: Float[Tensor, "..."]
    """[fits, hidden, intermediate]."""
    down: Float[Tensor, "..."]
    """[fits, intermediate, hidden]."""
    gate_bias: Float[Tensor, "..."] | None
    """[fits, 1, intermediate]."""
    up_bias: Float[Tensor, "..."] | None
    """[fits, 1, intermediate]."""
    down_bias: Float[Tensor, "..."] | None
    """[fits, 1, hidden]."""
    activation: str
    """Name of the nonlinearity."""

    @classmethod
    def of(cls, experts: Sequence[ExpertWeights], device: torch.device) -> "ExpertStack":
        """Stack experts of one shape."""

        def stacked(name: str) -> Tensor | None:
            tensors = [expert.tensors().get(name) for expert in experts]
            if tensors[0] is None:
                return None
            joined = torch.stack([t.detach().to(device).float() for t in tensors if t is not None])
            return joined.mT.contiguous() if joined.ndim == 3 else joined[:, None]

        names = ("gate", "up", "down", "gate_bias", "up_bias", "down_bias")
        parts: dict[str, Any] = {name: stacked(name) for name in names}
        return cls(**parts, activation=experts[0].activation)

    def __len__(self) -> int:
        return self.up.shape[0]

    def __call__(
        self, x: Float[Tensor, "fits tokens hidden"]
    ) -> Float[Tensor, "fits tokens hidden"]:
        """Outputs of every expert on its own inputs."""
        act = activation(self.activation)
        up = _affine(x, self.up, self.up_bias)  # [fits, tokens, intermediate]
        wide = act(up) if self.gate is None else act(_affine(x, self.gate, self.gate_bias)) * up
        return _affine(wide, self.down, self.down_bias)

    def keep(self, chosen: Tensor) -> "ExpertStack":
        """Some of the experts; `chosen` is a mask or indices."""

        def of(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[chosen]

        return ExpertStack(
            of(self.gate),
            self.up[chosen],
            self.down[chosen],
            of(self.gate_bias),
            of(self.up_bias),
            of(self.down_bias),
            self.activation,
        )


@dataclass(frozen=True, eq=False)
class AdapterStack:
    """Adapters of several fits, callable on inputs that all of them share."""

    weight: Float[Tensor, "fits hidden hidden"]
    """[fits, out, in]."""
    bias: Float[Tensor, "fits hidden"]
    """Added before LayerNorm."""
    gain: Float[Tensor, "fits hidden"]
    """Elementwise scale after LayerNorm."""
    shift: Float[Tensor, "fits hidden"]
    """Added after the scale."""
    eps: float = 1e-5
    """Added to the variance inside LayerNorm."""

    def __call__(self, x: Float[Tensor, "tokens hidden"]) -> Float[Tensor, "fits tokens hidden"]:
        """What each adapter makes of the same inputs."""
        shared = x.expand(len(self.weight), *x.shape)
        mixed = torch.baddbmm(self.bias[:, None], shared, self.weight.mT)
        normal = layer_norm(mixed, mixed.shape[-1:], eps=self.eps)
        return torch.addcmul(self.shift[:, None], normal, self.gain[:, None])

    def parameters(self) -> list[Tensor]:
        """The trained tensors: weight, bias, gain, shift."""
        return [self.weight, self.bias, self.gain, self.shift]

    def adapter(self, fit: int) -> Adapter:
        """One of them."""
        weight, bias, gain, shift = (p[fit].detach().clone() for p in self.parameters())
        return Adapter(weight, bias, gain, shift, self.eps)

    @classmethod
    def holding(cls, parameters: Sequence[Tensor]) -> "AdapterStack":
        """The inverse of `parameters`: weight, bias, gain, shift."""
        weight, bias, gain, shift = parameters
        return cls(weight, bias, gain, shift)

    def copy(self) -> "AdapterStack":
        """Adapters of the same values in other memory."""
        return self.holding([p.clone() for p in self.parameters()])


def _affine(x: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
    return torch.bmm(x, matrix) if bias is None else torch.baddbmm(bias, x, matrix)
