"""Several experts, or several adapters, of one shape as one batch of matrix products."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import layer_norm

from moescope.alignment.whitening import Whitening
from moescope.experts.activations import neurons
from moescope.experts.adapter import TENSORS, Adapter, Form
from moescope.experts.weights import ExpertWeights


def same_shape(experts: Sequence[ExpertWeights]) -> list[list[int]]:
    """Group experts that can be stacked; indices in order of first appearance."""
    groups: dict[tuple[object, ...], list[int]] = {}
    for i, expert in enumerate(experts):
        nonlinearity = (expert.activation, expert.limit, expert.up_offset)
        key = (expert.intermediate_size, *nonlinearity, *sorted(expert.tensors()))
        groups.setdefault(key, []).append(i)
    return list(groups.values())


@dataclass(frozen=True, eq=False)
class ExpertStack:
    """Experts of one shape, callable on a batch of inputs for each of them."""

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
    limit: float | None = None
    """As in `ExpertWeights`."""
    up_offset: float = 0.0
    """As in `ExpertWeights`."""

    @classmethod
    def of(cls, experts: Sequence[ExpertWeights], device: torch.device) -> "ExpertStack":
        """Stack experts of one shape, in fp32."""

        def stacked(name: str) -> Tensor | None:
            tensors = [expert.tensors().get(name) for expert in experts]
            if tensors[0] is None:
                return None
            joined = torch.stack([t.detach().to(device).float() for t in tensors if t is not None])
            return joined.mT.contiguous() if joined.ndim == 3 else joined[:, None]

        names = ("gate", "up", "down", "gate_bias", "up_bias", "down_bias")
        parts: dict[str, Any] = {name: stacked(name) for name in names}
        first = experts[0]
        return cls(
            **parts,
            activation=first.activation,
            limit=first.limit,
            up_offset=first.up_offset,
        )

    def __len__(self) -> int:
        return self.up.shape[0]

    def __call__(
        self, x: Float[Tensor, "fits tokens hidden"]
    ) -> Float[Tensor, "fits tokens hidden"]:
        """Outputs of every expert on its own inputs."""
        return _affine(self.neurons(*self.before(x)), self.down, self.down_bias)

    def before(self, x: Float[Tensor, "fits tokens hidden"]) -> list[Tensor]:
        """What the nonlinearity is given, [fits, tokens, intermediate]: gate and up, or up."""
        up = _affine(x, self.up, self.up_bias)
        return [up] if self.gate is None else [_affine(x, self.gate, self.gate_bias), up]

    def neurons(self, first: Tensor, up: Tensor | None = None) -> Tensor:
        """Activations of the neurons, [fits, tokens, intermediate], from what `before` gives."""
        return neurons(
            first,
            up,
            activation_name=self.activation,
            limit=self.limit,
            up_offset=self.up_offset,
        )

    def keep(self, chosen: Tensor) -> "ExpertStack":
        """Some of the experts; `chosen` is a mask or indices."""
        return self.changed(lambda tensor: tensor[chosen])

    def changed(self, change: Callable[[Tensor], Tensor]) -> "ExpertStack":
        """The same with `change` done to every tensor."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        parts: dict[str, Any] = {n: change(t) for n, t in tensors.items() if isinstance(t, Tensor)}
        return replace(self, **parts)


@dataclass(frozen=True, eq=False)
class AdapterStack:
    """Adapters of several fits and one form, callable on inputs that all of them share.

    As in `Adapter`, the tensors that the form lacks are None.
    """

    weight: Float[Tensor, "fits hidden hidden"] | None
    """[fits, out, in]."""
    bias: Float[Tensor, "fits hidden"] | None
    """Added before LayerNorm; without it there is no LayerNorm."""
    gain: Float[Tensor, "fits #hidden"] | None
    """Scale, after LayerNorm where there is one."""
    shift: Float[Tensor, "fits hidden"]
    """Added after the scale."""
    eps: float = 1e-5
    """Added to the variance inside LayerNorm."""
    diagonal: Float[Tensor, "fits hidden"] | None = None
    """D."""
    left: Float[Tensor, "fits hidden rank"] | None = None
    """U."""
    right: Float[Tensor, "fits rank hidden"] | None = None
    """V."""
    form: Form = "layer_norm"
    """Any but "identity", which has nothing to train."""

    @classmethod
    def holding(cls, form: Form, tensors: Mapping[str, Tensor]) -> "AdapterStack":
        """The inverse of `tensors`; names that the form lacks are passed over."""
        every = dict.fromkeys(("weight", "bias", "gain", "diagonal", "left", "right"))
        held: dict[str, Any] = every | {name: tensors[name] for name in TENSORS[form]}
        return cls(**held, form=form)

    def __len__(self) -> int:
        return self.shift.shape[0]

    def __call__(self, x: Float[Tensor, "tokens hidden"]) -> Float[Tensor, "fits tokens hidden"]:
        """What each adapter makes of the same inputs."""
        parts = self.tensors()
        mixed = x.expand(len(self), *x.shape)
        before = None if self.bias is None else self.bias[:, None]
        if "weight" in parts:
            mixed = _sum(torch.bmm(mixed, parts["weight"].mT), before)
        if "left" in parts:
            narrow = torch.bmm(mixed, parts["right"].mT)  # [fits, tokens, rank]
            delta = _sum(torch.bmm(narrow, parts["left"].mT), before)
            mixed = parts["diagonal"][:, None] * mixed + delta
        if self.bias is not None:
            mixed = layer_norm(mixed, mixed.shape[-1:], eps=self.eps)
        if "gain" in parts:
            return torch.addcmul(self.shift[:, None], mixed, parts["gain"][:, None])
        return mixed + self.shift[:, None]

    def tensors(self) -> dict[str, Tensor]:
        """The trained tensors by name: matrices [fits, a, b] and vectors [fits, a]."""
        return {name: getattr(self, name) for name in TENSORS[self.form]}

    def parameters(self) -> list[Tensor]:
        """The same without the names."""
        return list(self.tensors().values())

    def adapter(self, fit: int) -> Adapter:
        """One of them."""
        parts: dict[str, Any] = {n: t[fit].detach().clone() for n, t in self.tensors().items()}
        return Adapter(**parts, eps=self.eps, form=self.form)

    def copy(self) -> "AdapterStack":
        """Adapters of the same values in other memory."""
        return self.changed(torch.clone)

    def keep(self, chosen: Tensor) -> "AdapterStack":
        """Some of the adapters; `chosen` is a mask or indices."""
        return self.changed(lambda tensor: tensor[chosen])

    def changed(self, change: Callable[[Tensor], Tensor]) -> "AdapterStack":
        """The same with `change` done to every tensor."""
        parts: dict[str, Any] = {name: change(tensor) for name, tensor in self.tensors().items()}
        return replace(self, **parts)

    def silenced(self, shift: Float[Tensor, "fits hidden"]) -> "AdapterStack":
        """Adapters of the same form whose output is `shift`, whatever the input."""
        off = [name for name in self.tensors() if name != "shift"]
        if self.gain is not None and self.bias is None:
            off = ["gain"]  # the rest stays what the form promises
        zeros = {name: torch.zeros_like(self.tensors()[name]) for name in off}
        parts: dict[str, Any] = zeros | {"shift": shift}
        return replace(self, **parts)

    def folded(self, white: Whitening) -> "AdapterStack":
        """The adapters on plain inputs that equal these on white ones.

        `white.matrix` has to be one that the form can take up: a multiple of the identity for
        "orthogonal", diagonal for "low_rank" and "scale".
        """
        parts = self.tensors()
        across = white.matrix.diagonal()
        if self.form == "layer_norm":
            weight, bias = white.fold(parts["weight"], parts["bias"])
            return replace(self, weight=weight, bias=bias)
        if self.form == "linear":
            weight, shift = white.fold(parts["weight"], self.shift)
            return replace(self, weight=weight, shift=shift)
        if self.form == "low_rank":
            diagonal, right = parts["diagonal"] * across, parts["right"] @ white.matrix
            narrow = (right @ white.mean)[:, :, None]
            moved = diagonal * white.mean + torch.bmm(parts["left"], narrow)[:, :, 0]
            return replace(self, diagonal=diagonal, right=right, bias=parts["bias"] - moved)
        gain = parts["gain"] * across[: parts["gain"].shape[1]]
        turned = white.mean if self.weight is None else self.weight @ white.mean
        return replace(self, gain=gain, shift=self.shift - gain * turned)


def _affine(x: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
    return torch.bmm(x, matrix) if bias is None else torch.baddbmm(bias, x, matrix)


def _sum(product: Tensor, bias: Tensor | None) -> Tensor:
    # Not in the product, which may be of low precision: the bias is the larger of the two.
    return product if bias is None else product + bias
