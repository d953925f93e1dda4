"""DeepSeek V4: the first layers may choose experts by token id."""

from typing import Any

from torch import nn

from moescope.errors import ModelError
from moescope.models.families.fused import FusedLayer
from moescope.models.families.registry import register


@register("DeepseekV4SparseMoeBlock")
class DeepseekV4Layer(FusedLayer):
    """As usual, where the router chooses.

    Raises:
        ModelError: A table of token ids chooses.
    """

    def __init__(self, block: nn.Module, decoder_layer: nn.Module, **place: Any) -> None:
        super().__init__(block, decoder_layer, **place)
        if "tid2eid" in dict(self.router.named_buffers()):
            raise ModelError(
                f"layer {self.index} chooses experts by a table of token ids, so that the routing "
                "does not follow from the input of the block",
                got=f"a {type(self.router).__name__}",
            )
