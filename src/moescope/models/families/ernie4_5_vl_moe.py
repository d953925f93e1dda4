"""ERNIE 4.5 VL: tokens of text and of images have experts of their own; text is seen."""

from torch import nn

from moescope.models.families.fused import FusedLayer
from moescope.models.families.registry import register


@register("Ernie4_5_VLMoeMoeBlock")
class Ernie45VLLayer(FusedLayer):
    """`text_moe` beside `vision_moe`, each a router and experts, and one shared expert."""

    @property
    def router(self) -> nn.Module:
        """`block.text_moe.gate`."""
        return self.block.get_submodule("text_moe.gate")

    @property
    def experts(self) -> nn.Module:
        """`block.text_moe.experts`."""
        return self.block.get_submodule("text_moe.experts")
