"""The pattern that most families share: a router, and experts called with its choice."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from moescope.errors import ModelError
from moescope.experts.weights import ExpertWeights
from moescope.models.families.gating import Gating, gated, plain
from moescope.models.families.linear_router import ROUTERS, linear_map, router_of
from moescope.models.families.probing import arguments_given, scale_of
from moescope.models.families.shared import shared_experts
from moescope.models.offload import resident
from moescope.models.patching import Forward, noted, wrapped
from moescope.models.view import MoELayer, Replacement, Rerouting, Routing

_TOKENS_AT_ONCE = 4096  # bounds what an expert holds in between


class FusedLayer(MoELayer):
    """`block.gate(x) -> (logits, weights, experts)`, `block.experts(x, experts, weights)`.

    The router is called `gate` or `router` and holds one matrix as wide as the model. The experts
    hold `gate_up_proj` (or `up_proj`) and `down_proj`, stacked, in the layout that transformers
    notes on the module. The block may multiply the sum of its experts by a number that it holds.
    What is called `shared_...` in the block is a shared expert, behind `shared_..._gate` if there
    is one. Whether all this holds, conformance proves.
    """

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._changes: list[Rerouting] = []
        self._own_forward: Forward | None = None  # of the experts module, while it is replaced

    @staticmethod
    def fits(block: nn.Module) -> bool:
        """Whether a module is built like this."""
        children = dict(block.named_children())
        tensors = dict(children["experts"].named_parameters()) if "experts" in children else {}
        down = tensors.get("down_proj")
        return any(name in children for name in ROUTERS) and down is not None and down.ndim == 3

    @property
    def router(self) -> nn.Module:
        """`block.gate` or `block.router`."""
        return router_of(self.block)

    @property
    def experts(self) -> nn.Module:
        """`block.experts`."""
        return self.block.get_submodule("experts")

    @property
    def router_weight(self) -> Float[Tensor, "experts hidden"]:
        """The matrix in the router, detached."""
        return self._router_map[0]

    @property
    def router_bias(self) -> Float[Tensor, " experts"] | None:
        """The `bias` beside that matrix."""
        return self._router_map[1]

    @property
    def _router_map(self) -> tuple[Tensor, Tensor | None]:
        turned = self._layout("is_transposed")
        num_experts, *sides = self.experts.get_parameter("down_proj").shape
        hidden_size = sides[1 if turned else 0]
        weight, bias = linear_map(self.router, num_experts)
        if weight.shape[1] != hidden_size:
            raise ModelError(
                f"the experts of layer {self.index} work in a space of their own",
                got=f"experts of hidden size {hidden_size}, a router of {weight.shape[1]}",
            )
        # Rows beyond those of the experts are the router's word on shared experts.
        return weight[:num_experts], None if bias is None else bias[:num_experts]

    @property
    def intermediate_size(self) -> int:
        """From the shape of `down_proj`."""
        transposed: Any = self._layout("is_transposed")
        return self.experts.get_parameter("down_proj").shape[1 if transposed else 2]

    def router_logits(self, router_output: Any) -> Float[Tensor, "tokens experts"]:
        """First of what the router returns."""
        logits: Tensor = router_output[0]
        return logits

    def used_routing(
        self, experts_arguments: tuple[Any, ...]
    ) -> tuple[Int64[Tensor, "tokens top_k"], Float[Tensor, "tokens top_k"]]:
        """Experts and weights within what the experts module is called with."""
        _, experts, weights = experts_arguments
        return experts, weights

    def experts_arguments(
        self,
        x: Float[Tensor, "tokens hidden"],
        experts: Int64[Tensor, "tokens top_k"],
        weights: Float[Tensor, "tokens top_k"],
    ) -> tuple[Any, ...]:
        """What the experts module is called with: the inverse of `used_routing`."""
        return x, experts, weights

    @cached_property
    def output_scale(self) -> float:
        """What the block multiplies the sum of its experts by: 1, or a number that it holds.

        Routing weights are seen with this factor in them.
        """
        with resident(self.block):
            shape = (1, 1, self.hidden_size)
            zeros = torch.zeros(shape, dtype=self._dtype, device=self._device)
            return scale_of(self.experts, self.block, zeros)

    @contextmanager
    def on_routing(self, seen: Callable[[Tensor, Tensor], None]) -> Iterator[None]:
        """From what the experts module is called with."""
        scale = self.output_scale

        def before(_: nn.Module, arguments: tuple[Any, ...]) -> None:
            experts, weights = self.used_routing(arguments)
            seen(experts, weights * scale)

        handle = self.experts.register_forward_pre_hook(before)
        try:
            yield
        finally:
            handle.remove()

    def route(self, x: Float[Tensor, "tokens hidden"]) -> Routing:
        """What the block has its router choose for `x`; it stops before the experts run."""
        logits: list[Tensor] = []
        handle = self.router.register_forward_hook(
            lambda _, __, output: logits.append(self.router_logits(output))
        )
        rows = x.to(self._device, self._dtype)[None]
        try:
            arguments = arguments_given(self.experts, lambda: self.block.forward(rows))
        finally:
            handle.remove()
        experts, weights = self.used_routing(arguments)
        return Routing(logits=logits[0], weights=weights * self.output_scale, experts=experts)

    def expert_outputs(
        self, x: Float[Tensor, "tokens hidden"], experts: Sequence[int]
    ) -> Float[Tensor, "experts tokens hidden"]:
        """By calling the experts module with one expert and weight 1."""
        self.check_experts(experts)
        forward = self._own_forward or self.experts.forward
        x = x.to(self._device, self._dtype)
        outputs = x.new_empty(len(experts), *x.shape)
        for start in range(0, len(x), _TOKENS_AT_ONCE):
            tokens = slice(start, start + _TOKENS_AT_ONCE)
            for row, expert in enumerate(experts):
                outputs[row, tokens] = self._one_expert(forward, expert, x[tokens])
        return outputs

    def shared_output(
        self, x: Float[Tensor, "tokens hidden"]
    ) -> Float[Tensor, "tokens hidden"] | None:
        """What is called `shared_...` in the block."""
        return shared_experts(self.block, x)

    def expert_weights(self, expert: int) -> ExpertWeights:
        """Views of the fused tensors."""
        tensors = self.expert_tensors(expert)
        turned = self._layout("is_transposed")
        matrices = {
            name: tensor.mT if turned and tensor.ndim == 2 else tensor
            for name, tensor in tensors.items()
        }
        gating = self._gating
        parts = {
            "down": matrices["down_proj"],
            "down_bias": matrices.get("down_proj_bias"),
        }
        if self._layout("has_gate"):
            parts["gate"], parts["up"] = gating.split(matrices["gate_up_proj"], dim=0)
            if "gate_up_proj_bias" in matrices:
                biases = gating.split(matrices["gate_up_proj_bias"], dim=0)
                parts["gate_bias"], parts["up_bias"] = biases
        else:
            parts |= {"gate": None, "up": matrices["up_proj"]}
            parts["up_bias"] = matrices.get("up_proj_bias")
        numbers: dict[str, Any] = parts
        return ExpertWeights(
            **numbers,
            activation=gating.activation,
            limit=gating.limit,
            up_offset=gating.up_offset,
        )

    def expert_tensors(self, expert: int) -> dict[str, Tensor]:
        """Rows of the fused tensors."""
        self.check_experts([expert])
        return {
            name: tensor.detach()[expert]
            for name, tensor in self.experts.named_parameters(recurse=False)
        }

    @contextmanager
    def replacing(self, expert: int, function: Replacement) -> Iterator[None]:
        """The experts module runs with weight 0 there, and the other outputs are added."""
        self.check_experts([expert])

        def around(forward: Forward) -> Forward:
            def original(rows: Tensor) -> Tensor:
                return self._one_expert(forward, expert, rows)

            def replaced(x: Tensor, *arguments: Any) -> Tensor:
                experts, weights = self.used_routing((x, *arguments))
                mine = experts == expert
                rest = weights.masked_fill(mine, 0)
                output: Tensor = forward(*self.experts_arguments(x, experts, rest))
                tokens, slots = torch.where(mine)
                # Also without tokens: whoever trains an adapter expects a graph.
                new = weights[tokens, slots, None] * function(original, x[tokens])
                flat = output.reshape(-1, output.shape[-1])
                return flat.index_add(0, tokens, new.to(output)).view_as(output)

            return replaced

        outermost = self._own_forward is None
        self._own_forward = self._own_forward or self.experts.forward
        try:
            with wrapped(self.experts, around):
                yield
        finally:
            if outermost:
                self._own_forward = None

    @contextmanager
    def rerouting(self, change: Rerouting) -> Iterator[None]:
        """The arguments of the experts module are changed before anyone sees them."""
        self._changes.append(change)
        try:
            if len(self._changes) > 1:  # the hook of the first sees to all
                yield
            else:
                with self._rerouted():
                    yield
        finally:
            self._changes.pop()

    @contextmanager
    def _rerouted(self) -> Iterator[None]:
        scale = self.output_scale

        def before(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
            experts, weights = self.used_routing(arguments)
            weights = weights * scale
            for change in self._changes:
                experts, weights = change(experts, weights)
            return self.experts_arguments(arguments[0], experts, weights / scale)

        handle = self.experts.register_forward_pre_hook(before, prepend=True)
        try:
            with noted(self.experts):
                yield
        finally:
            handle.remove()

    def _one_expert(self, forward: Forward, expert: int, x: Tensor) -> Tensor:
        """Unweighted outputs of one expert by the experts module."""
        experts = torch.full((len(x), 1), expert, device=x.device)
        output: Tensor = forward(*self.experts_arguments(x, experts, x.new_ones(len(x), 1)))
        return output.reshape(x.shape)

    @property
    def _dtype(self) -> torch.dtype:
        down = self.experts.get_parameter("down_proj")
        # Quantised experts are given what the router is given.
        return down.dtype if down.is_floating_point() else self.router_weight.dtype

    @property
    def _device(self) -> torch.device:
        return self.experts.get_parameter("down_proj").device

    def _layout(self, name: str) -> bool:
        """What transformers notes on the module about the layout of its tensors."""
        defaults = {"has_gate": True, "is_transposed": False}
        return bool(getattr(self.experts, name, defaults[name]))

    @cached_property
    def _gating(self) -> Gating:
        return (gated if self._layout("has_gate") else plain)(self.experts)
