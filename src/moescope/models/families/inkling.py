"""Inkling: the router weighs the shared experts too."""

from jaxtyping import Float
from torch import Tensor

from moescope.models.families.fused import FusedLayer
from moescope.models.families.registry import register


@register("InklingMoE")
class InklingLayer(FusedLayer):
    """`router(x) -> (logits, weights, experts, shared weights)`, `shared_experts(x, weights)`."""

    def shared_output(
        self, x: Float[Tensor, "tokens hidden"]
    ) -> Float[Tensor, "tokens hidden"] | None:
        """The shared experts, by their part of the softmax over all that are used."""
        x = x.to(self._device, self._dtype)
        *_, weights = self.router(x)
        output: Tensor = self.block.get_submodule("shared_experts")(x, weights)
        return output
