"""Qwen3-MoE: softmax router, no shared expert."""

from moescope.models.families.fused import FusedLayer
from moescope.models.families.registry import register


@register
class Qwen3MoeLayer(FusedLayer):
    """Weights are the softmax over all experts, renormalised over the chosen if configured."""

    family = "qwen3_moe"
    block_class = "Qwen3MoeSparseMoeBlock"
