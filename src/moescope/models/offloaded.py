"""The view of a layer whose weights are offloaded."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from moescope.errors import ModelError
from moescope.experts.weights import ExpertWeights
from moescope.models.offload import is_offloaded, resident
from moescope.models.view import MoELayer, Replacement, Rerouting, Routing


class OffloadedLayer(MoELayer):
    """A layer whose weights come into memory for each thing that is asked of it.

    What it gives are copies; there is nothing to write into.
    """

    @classmethod
    def of(cls, layer: MoELayer) -> MoELayer:
        """The layer itself, unless some of its weights are offloaded."""
        return cls(layer) if is_offloaded(layer.block) else layer

    def __init__(self, layer: MoELayer) -> None:
        super().__init__(
            layer.block,
            layer.decoder_layer,
            index=layer.index,
            stack=layer.stack,
            family=layer.family,
        )
        vars(self)["shared_in_block"] = layer.shared_in_block
        vars(self)["weighs_inputs"] = layer.weighs_inputs
        self._layer = layer

    @property
    def router(self) -> nn.Module:
        """As in memory."""
        return self._layer.router

    @property
    def router_weight(self) -> Float[Tensor, "experts hidden"]:
        """A copy."""
        with resident(self.router):
            return self._layer.router_weight

    @property
    def router_bias(self) -> Float[Tensor, " experts"] | None:
        """A copy."""
        with resident(self.router):
            return self._layer.router_bias

    @property
    def num_experts(self) -> int:
        """As in memory."""
        return self._layer.num_experts

    @property
    def hidden_size(self) -> int:
        """As in memory."""
        return self._layer.hidden_size

    @property
    def has_shared_expert(self) -> bool:
        """As in memory."""
        with resident(self.decoder_layer):
            return self._layer.has_shared_expert

    @property
    def intermediate_size(self) -> int:
        """As in memory."""
        return self._layer.intermediate_size

    def router_logits(self, router_output: Any) -> Float[Tensor, "tokens experts"]:
        """As in memory."""
        return self._layer.router_logits(router_output)

    def on_routing(self, seen: Callable[[Tensor, Tensor], None]) -> AbstractContextManager[None]:
        """As in memory."""
        return self._layer.on_routing(seen)

    def route(self, x: Float[Tensor, "tokens hidden"]) -> Routing:
        """As in memory."""
        with resident(self.block):
            return self._layer.route(x)

    def expert_outputs(
        self, x: Float[Tensor, "tokens hidden"], experts: Sequence[int]
    ) -> Float[Tensor, "experts tokens hidden"]:
        """As in memory."""
        with resident(self.block):
            return self._layer.expert_outputs(x, experts)

    def shared_output(
        self, x: Float[Tensor, "tokens hidden"]
    ) -> Float[Tensor, "tokens hidden"] | None:
        """As in memory."""
        with resident(self.decoder_layer):  # some families have it beside the block
            return self._layer.shared_output(x)

    def expert_weights(self, expert: int) -> ExpertWeights:
        """A copy of the weights."""
        with resident(self.block):
            weights = self._layer.expert_weights(expert)
            copies: dict[str, Any] = {n: tensor.clone() for n, tensor in weights.tensors().items()}
        return replace(weights, **copies)

    def expert_tensors(self, expert: int) -> dict[str, Tensor]:
        """Refused.

        Raises:
            ModelError: Always.
        """
        raise ModelError(
            f"the weights of layer {self.index} cannot be changed: they are offloaded",
            remedy="Load the model with a device_map that keeps all weights on devices",
        )

    @contextmanager
    def replacing(self, expert: int, function: Replacement) -> Iterator[None]:
        """As in memory; the weights of the block stay there meanwhile."""
        with resident(self.block), self._layer.replacing(expert, function):
            yield

    @contextmanager
    def rerouting(self, change: Rerouting) -> Iterator[None]:
        """As in memory; the weights of the block stay there meanwhile."""
        with resident(self.block), self._layer.rerouting(change):
            yield

    @contextmanager
    def masking(self, experts: Sequence[int]) -> Iterator[None]:
        """As in memory; the weights of the block stay there meanwhile."""
        with resident(self.block), self._layer.masking(experts):
            yield
