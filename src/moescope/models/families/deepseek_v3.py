"""DeepSeek-V3: sigmoid router with a bias that only chooses, shared experts, dense first layers."""

from jaxtyping import Float
from torch import Tensor

from moescope.models.families.fused import FusedLayer
from moescope.models.families.registry import register


@register
class DeepseekV3Layer(FusedLayer):
    """The correction bias and the groups choose; weights are the sigmoids without the bias.

    Weights are normalised over the chosen if configured, times `routed_scaling_factor`.
    """

    family = "deepseek_v3"
    block_class = "DeepseekV3MoE"

    def shared_output(self, x: Float[Tensor, "tokens hidden"]) -> Float[Tensor, "tokens hidden"]:
        """`shared_experts(x)`: as one wide expert, without a gate."""
        output: Tensor = self.block.get_submodule("shared_experts")(x.to(self._down))
        return output
