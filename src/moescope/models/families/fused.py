"""The layout that most families share: fused expert tensors beside a linear router."""

from abc import ABC
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn.functional import linear

from moescope.experts.weights import ExpertWeights
from moescope.models.view import MoELayer, Routing

_TOKENS_AT_ONCE = 4096  # bounds the [tokens, 2 * intermediate] in between


class FusedLayer(MoELayer, ABC):
    """`block.gate(x) -> (logits, weights, experts)`, `block.experts(x, experts, weights)`.

    The experts hold `gate_up_proj` [experts, 2 * intermediate, hidden], gate first, and
    `down_proj` [experts, hidden, intermediate], without biases. The block lies at `layer.mlp`
    behind `layer.post_attention_layernorm`.
    """

    block_path = "mlp"

    @property
    def router(self) -> nn.Module:
        """`block.gate`."""
        return self.block.get_submodule("gate")

    @property
    def experts(self) -> nn.Module:
        """`block.experts`."""
        return self.block.get_submodule("experts")

    @property
    def residual_norm(self) -> nn.Module:
        """`layer.post_attention_layernorm`."""
        return self.decoder_layer.get_submodule("post_attention_layernorm")

    @property
    def router_weight(self) -> Float[Tensor, "experts hidden"]:
        """`block.gate.weight`, detached."""
        return self.router.get_parameter("weight").detach()

    @property
    def top_k(self) -> int:
        """`block.gate.top_k`: what the router does, whatever the configuration says."""
        router: Any = self.router
        return int(router.top_k)

    @property
    def intermediate_size(self) -> int:
        """From the shape of `down_proj`."""
        return self._down.shape[-1]

    @property
    def _gate_up(self) -> Tensor:
        return self.experts.get_parameter("gate_up_proj").detach()

    @property
    def _down(self) -> Tensor:
        return self.experts.get_parameter("down_proj").detach()

    def router_logits(self, router_output: Any) -> Float[Tensor, "tokens experts"]:
        """First of what `block.gate` returns."""
        logits: Tensor = router_output[0]
        return logits

    def used_routing(
        self, experts_arguments: tuple[Any, ...]
    ) -> tuple[Int64[Tensor, "tokens top_k"], Float[Tensor, "tokens top_k"]]:
        """Second and third of what `block.experts` is called with."""
        _, experts, weights = experts_arguments
        return experts, weights

    def route(self, x: Float[Tensor, "tokens hidden"]) -> Routing:
        """What `block.gate` returns for `x`."""
        logits, weights, experts = self.router(x.to(self.router_weight))
        return Routing(logits=logits, weights=weights, experts=experts)

    def expert_outputs(
        self, x: Float[Tensor, "tokens hidden"], experts: Sequence[int]
    ) -> Float[Tensor, "experts tokens hidden"]:
        """Outputs from the fused tensors, with the gating function of the experts module."""
        self.check_experts(experts)
        gate_up, down = self._gate_up, self._down
        apply_gate: Any = self.experts._apply_gate
        x = x.to(down)
        outputs = x.new_empty(len(experts), *x.shape)
        # Expert by expert: indexing several at once would copy their weights.
        for start in range(0, len(x), _TOKENS_AT_ONCE):
            tokens = slice(start, start + _TOKENS_AT_ONCE)
            for row, expert in enumerate(experts):
                wide = apply_gate(linear(x[tokens], gate_up[expert]))
                outputs[row, tokens] = linear(wide, down[expert])
        return outputs

    def shared_output(
        self, x: Float[Tensor, "tokens hidden"]
    ) -> Float[Tensor, "tokens hidden"] | None:
        """None; families with a shared expert override this."""
        return None

    def expert_weights(self, expert: int) -> ExpertWeights:
        """Views of the fused tensors."""
        self.check_experts([expert])
        gate, up = torch.chunk(self._gate_up[expert], 2)
        config: Any = self.experts.config
        return ExpertWeights(gate, up, self._down[expert], activation=config.hidden_act)
