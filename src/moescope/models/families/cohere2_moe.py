"""Cohere 2 MoE: routed and shared experts may be averaged rather than added."""

from jaxtyping import Float
from torch import Tensor

from moescope.models.families.fused import FusedLayer
from moescope.models.families.registry import register


@register("Cohere2MoeSparseMoeBlock")
class Cohere2MoeLayer(FusedLayer):
    """`(sum of experts + shared_experts(x)) / 2`, or without the half."""

    @property
    def output_scale(self) -> float:
        """A half where the configuration says "average" and there is a shared expert."""
        told = vars(self.block)
        averaged = told["shared_expert_combination_strategy"] == "average"
        return 0.5 if averaged and told["num_shared_experts"] else 1.0

    def shared_output(
        self, x: Float[Tensor, "tokens hidden"]
    ) -> Float[Tensor, "tokens hidden"] | None:
        """As it is added: halved where it is averaged."""
        output = super().shared_output(x)
        return None if output is None else output * self.output_scale
