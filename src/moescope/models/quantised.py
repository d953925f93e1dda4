"""The view of a layer whose experts are quantised."""

from typing import NoReturn

from torch import Tensor, nn

from moescope.errors import ModelError
from moescope.experts.weights import ExpertWeights
from moescope.models.offloaded import OffloadedLayer
from moescope.models.view import MoELayer


def is_quantised(tensor: Tensor) -> bool:
    """Whether a parameter is no plain tensor of floating-point numbers."""
    floating = tensor.is_floating_point() and tensor.dtype.itemsize > 1  # fp8 needs its scales
    return type(tensor) not in (Tensor, nn.Parameter) or not floating


class QuantisedLayer(OffloadedLayer):
    """A layer whose experts can be called, but neither read as plain numbers nor written."""

    @classmethod
    def of(cls, layer: MoELayer) -> MoELayer:
        """The layer itself, unless some weights of its experts are quantised."""
        experts = dict(layer.block.named_children()).get("experts", layer.block)
        quantised = any(is_quantised(tensor) for tensor in experts.parameters())
        return cls(layer) if quantised else layer

    def expert_weights(self, expert: int) -> ExpertWeights:
        """Refused.

        Raises:
            OptionError: There is no such expert.
            ModelError: Otherwise.
        """
        self._refuse(expert)

    def expert_tensors(self, expert: int) -> dict[str, Tensor]:
        """Refused.

        Raises:
            OptionError: There is no such expert.
            ModelError: Otherwise.
        """
        self._refuse(expert)

    def _refuse(self, expert: int) -> NoReturn:
        self.check_experts([expert])
        raise ModelError(
            f"the experts of layer {self.index} are quantised: they can be called, but neither "
            "read as plain numbers nor changed",
            remedy="Load the model without quantisation, or dequantise it",
        )
