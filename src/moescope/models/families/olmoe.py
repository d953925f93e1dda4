"""OLMoE: softmax router, no shared expert."""

from moescope.models.families.fused import FusedLayer
from moescope.models.families.registry import register


@register
class OlmoeLayer(FusedLayer):
    """Weights are the softmax over all experts, renormalised over the chosen if configured."""

    family = "olmoe"
    block_class = "OlmoeSparseMoeBlock"
