"""Qwen1.5-MoE, Qwen2-MoE: softmax router, one shared expert behind a sigmoid gate."""

from jaxtyping import Float
from torch import Tensor, sigmoid

from moescope.models.families.fused import FusedLayer
from moescope.models.families.registry import register


@register
class Qwen2MoeLayer(FusedLayer):
    """Weights are the softmax over all experts, renormalised over the chosen if configured."""

    family = "qwen2_moe"
    block_class = "Qwen2MoeSparseMoeBlock"

    def shared_output(self, x: Float[Tensor, "tokens hidden"]) -> Float[Tensor, "tokens hidden"]:
        """`sigmoid(shared_expert_gate(x)) * shared_expert(x)`."""
        x = x.to(self._down)
        shared = self.block.get_submodule("shared_expert")(x)
        gate = self.block.get_submodule("shared_expert_gate")(x)  # [tokens, 1]
        output: Tensor = sigmoid(gate) * shared
        return output
