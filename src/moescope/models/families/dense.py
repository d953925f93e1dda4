"""Dense models as one expert per layer, so that ordinary feed-forward layers can be aligned."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from moescope.experts.weights import ExpertWeights
from moescope.models.families.feed_forward import feed_forward_weights
from moescope.models.families.rebuilt import RebuiltLayer
from moescope.models.patching import Forward
from moescope.models.view import Routing


class DenseLayer(RebuiltLayer):
    """The feed-forward network is expert 0, which every token goes to with weight 1, logit 0.

    Nothing routes: the block stands in for the router too.
    """

    @property
    def router(self) -> nn.Module:
        """The block."""
        return self.block

    @property
    def router_weight(self) -> Float[Tensor, "experts hidden"]:
        """Zeros, which give logit 0."""
        down = feed_forward_weights(self.block).down
        return down.new_zeros(1, down.shape[0])

    @property
    def router_bias(self) -> None:
        """None."""
        return None

    @property
    def intermediate_size(self) -> int:
        """From the matrices."""
        return self.expert_weights(0).intermediate_size

    def router_logits(self, router_output: Any) -> Float[Tensor, "tokens experts"]:
        """Zeros, one per token."""
        hidden: Tensor = router_output
        return hidden.new_zeros(hidden.shape[:-1].numel(), 1)

    def chosen(
        self, router_output: Any
    ) -> tuple[Int64[Tensor, "tokens top_k"], Float[Tensor, "tokens top_k"]]:
        """Expert 0, weight 1."""
        logits = self.router_logits(router_output)
        return torch.zeros_like(logits, dtype=torch.int64), torch.ones_like(logits)

    def block_output(
        self, output: Float[Tensor, "tokens hidden"], x: Tensor, router_output: Any
    ) -> Any:
        """In the shape of the input."""
        return output.view_as(x)

    @contextmanager
    def on_routing(self, seen: Callable[[Tensor, Tensor], None]) -> Iterator[None]:
        """Before the block runs."""

        def before(_: nn.Module, arguments: tuple[Any, ...]) -> None:
            seen(*self._used(arguments[0]))

        handle = self.block.register_forward_pre_hook(before)
        try:
            yield
        finally:
            handle.remove()

    def route(self, x: Float[Tensor, "tokens hidden"]) -> Routing:
        """Expert 0, weight 1."""
        experts, weights = self._used(x)
        return Routing(logits=self.router_logits(x), weights=weights, experts=experts)

    def expert_outputs(
        self, x: Float[Tensor, "tokens hidden"], experts: Sequence[int]
    ) -> Float[Tensor, "experts tokens hidden"]:
        """What the block computes where nothing replaces it."""
        self.check_experts(experts)
        forward: Any = type(self.block).forward
        output: Tensor = forward(self.block, x.to(self.router_weight)[None])
        return output.expand(len(experts), -1, -1)

    def expert_weights(self, expert: int) -> ExpertWeights:
        """Views of the matrices."""
        self.check_experts([expert])
        return feed_forward_weights(self.block)

    def expert_tensors(self, expert: int) -> dict[str, Tensor]:
        """The parameters of the block."""
        self.check_experts([expert])
        return {name: parameter.detach() for name, parameter in self.block.named_parameters()}

    def _from_parts(self, _: Forward) -> Forward:
        def forward(x: Tensor) -> Any:
            rows = x.reshape(-1, self.hidden_size)
            experts, weights = self._used(rows)
            weight = weights.masked_fill(experts != 0, 0).sum(1)
            return self.block_output(self.weigh(self._function(0), rows, weight), x, rows)

        return forward
