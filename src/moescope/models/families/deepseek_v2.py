"""DeepSeek-V2: softmax router, greedy or limited to groups, shared experts, dense first layers."""

from jaxtyping import Float
from torch import Tensor

from moescope.models.families.fused import FusedLayer
from moescope.models.families.registry import register


@register
class DeepseekV2Layer(FusedLayer):
    """Weights are the softmax over all experts times `routed_scaling_factor`."""

    family = "deepseek_v2"
    block_class = "DeepseekV2Moe"

    def shared_output(self, x: Float[Tensor, "tokens hidden"]) -> Float[Tensor, "tokens hidden"]:
        """`shared_experts(x)`: as one wide expert, without a gate."""
        output: Tensor = self.block.get_submodule("shared_experts")(x.to(self._down))
        return output
