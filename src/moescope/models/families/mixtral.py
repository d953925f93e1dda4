"""Mixtral: softmax router, weights renormalised over the chosen experts, no shared expert."""

from moescope.models.families.fused import FusedLayer
from moescope.models.families.registry import register


@register
class MixtralLayer(FusedLayer):
    """Weights of the chosen experts add up to one."""

    family = "mixtral"
    block_class = "MixtralSparseMoeBlock"
