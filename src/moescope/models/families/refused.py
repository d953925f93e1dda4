"""Blocks that are no layer of experts as moescope sees one: refused, each with its reason."""

from typing import Any

from torch import nn

from moescope.errors import ModelError
from moescope.models.families.fused import FusedLayer
from moescope.models.families.registry import register

_DIFFUSION = "it decodes a canvas of noise, so that its decoder does not run on the tokens given"
_REASONS = {
    "DiffusionGemmaDecoderTextLayer": _DIFFUSION,
    "DiffusionGemmaEncoderTextLayer": _DIFFUSION,
    "DogeCDMoE": "its router mixes the tokens of a batch: no token has a routing of its own",
    "ZayaSparseMoeBlock": "its router takes what the router of the layer before it computed, so "
    "that the routing does not follow from the input of the block",
}


class RefusedLayer(FusedLayer):
    """No layer: it cannot be made.

    Raises:
        ModelError: Says why.
    """

    def __init__(self, block: nn.Module, _: nn.Module, **place: Any) -> None:
        raise ModelError(
            f"{place['family']} cannot be seen as experts that a router chooses by the "
            "input of the block",
            got=_REASONS[type(block).__name__],
        )


for _block_class in _REASONS:
    register(_block_class)(RefusedLayer)
