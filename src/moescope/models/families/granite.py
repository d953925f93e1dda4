"""The Granite families whose shared expert lies beside the sparse block."""

from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from moescope.models.families.fused import FusedLayer
from moescope.models.families.registry import register
from moescope.models.families.shared import shared_experts


@register("GraniteMoeSharedMoE")
@register("GraniteMoeHybridMoE")
@register("GraniteMoeSWAMoE")
class GraniteSharedLayer(FusedLayer):
    """As usual; the decoder layer adds `shared_mlp(x)` to what the block returns."""

    shared_in_block: ClassVar[bool] = False

    def shared_output(
        self, x: Float[Tensor, "tokens hidden"]
    ) -> Float[Tensor, "tokens hidden"] | None:
        """`decoder_layer.shared_mlp(x)`, if there is one."""
        return shared_experts(self.decoder_layer, x)
