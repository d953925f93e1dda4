"""Watches what the mixture-of-experts layers do during forward passes."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float, Int64
from torch import Tensor, nn

from moescope.models.view import MoELayer, Routing


@dataclass(frozen=True, eq=False)
class Observation:
    """One pass through one mixture-of-experts layer.

    Tokens are rows: position `p` of row `r` of a batch is token `r * length + p`. Tensors are
    detached, in the dtype and on the device of the model, and nobody writes into them later.
    """

    layer: MoELayer
    """The layer."""
    input: Float[Tensor, "tokens hidden"]
    """What the block was given: the residual stream after its norm."""
    routing: Routing
    """What the router said and which experts were used with which weights."""
    output: Float[Tensor, "tokens hidden"]
    """What the block returned, the shared expert included."""
    residual: Float[Tensor, "tokens hidden"] | None
    """The residual stream before the block and its norm, if asked for."""


Callback = Callable[[Observation], None]


@contextmanager
def observe(
    layers: Sequence[MoELayer], callback: Callback, *, residual: bool = False
) -> Iterator[None]:
    """Call `callback` once per layer and forward pass, as soon as the block has returned.

    Routing is taken from what the experts were called with, so it is what was used, also where
    a bias or groups choose, or somebody intervenes. Hooks are removed at the end, whatever
    happens in between.

    Args:
        layers: Which layers to watch.
        callback: Gets each observation; what it raises ends the forward pass.
        residual: Whether to observe the residual stream too.
    """
    with ExitStack() as stack:
        for layer in layers:
            for handle in _Watch(layer, callback).hooks(residual=residual):
                stack.callback(handle.remove)
        yield


class _Watch:
    """Collects the parts of one observation while they pass by."""

    def __init__(self, layer: MoELayer, callback: Callback) -> None:
        self.layer = layer
        self.callback = callback
        self.residual: Float[Tensor, "tokens hidden"] | None = None
        self.logits: Float[Tensor, "tokens experts"]
        self.experts: Int64[Tensor, "tokens top_k"]
        self.weights: Float[Tensor, "tokens top_k"]

    def hooks(self, *, residual: bool) -> Iterator[Any]:
        """Register the hooks, yielding a handle for each."""
        layer = self.layer
        if residual:
            yield layer.residual_norm.register_forward_pre_hook(self._norm_starts)
        yield layer.router.register_forward_hook(self._router_ends)
        yield layer.experts.register_forward_pre_hook(self._experts_start)
        yield layer.block.register_forward_hook(self._block_ends)

    def _norm_starts(self, _: nn.Module, arguments: tuple[Any, ...]) -> None:
        self.residual = self._rows(arguments[0])

    def _router_ends(self, _: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        self.logits = self.layer.router_logits(output).detach()

    def _experts_start(self, _: nn.Module, arguments: tuple[Any, ...]) -> None:
        experts, weights = self.layer.used_routing(arguments)
        self.experts, self.weights = experts.detach(), weights.detach()

    def _block_ends(self, _: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        routing = Routing(logits=self.logits, weights=self.weights, experts=self.experts)
        observation = Observation(
            self.layer,
            input=self._rows(arguments[0]),
            routing=routing,
            output=self._rows(output),
            residual=self.residual,
        )
        # Nothing may outlive its pass: it would be held in memory, or mixed into the next.
        self.residual = None
        del self.logits, self.experts, self.weights
        self.callback(observation)

    def _rows(self, hidden: Tensor) -> Float[Tensor, "tokens hidden"]:
        return hidden.detach().reshape(-1, self.layer.hidden_size)
