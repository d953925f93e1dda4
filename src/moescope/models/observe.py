"""Watches what the mixture-of-experts layers do during forward passes."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
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
    """The residual stream before the block and its norm, if asked for; the input itself where no
    norm stands before the block."""


Callback = Callable[[Observation], None]

# What a callback asks of a layer (`route`, `top_k`) is not part of the pass of other observers.
_calling_back: ContextVar[bool] = ContextVar("a callback is running", default=False)


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
            _Watch(layer, callback).enter(stack, residual=residual)
        yield


class _Watch:
    """Collects the parts of one observation while they pass by."""

    def __init__(self, layer: MoELayer, callback: Callback) -> None:
        self.layer = layer
        self.callback = callback
        self.normed: dict[int, tuple[Tensor, Tensor]] | None = None
        self.logits: Float[Tensor, "tokens experts"]
        self.experts: Int64[Tensor, "tokens top_k"]
        self.weights: Float[Tensor, "tokens top_k"]

    def enter(self, stack: ExitStack, *, residual: bool) -> None:
        """Register the hooks; the stack removes them."""
        layer = self.layer
        handles = [
            layer.router.register_forward_hook(self._router_ends),
            layer.block.register_forward_hook(self._block_ends, with_kwargs=True),
        ]
        if residual:
            self.normed = {}
            handles += [module.register_forward_hook(self._norm_ends) for module in _before(layer)]
        for handle in handles:
            stack.callback(handle.remove)
        stack.enter_context(layer.on_routing(self._routed))

    def _norm_ends(self, _: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        """Note what turned into what: the norm is the module whose output the block is given."""
        if self.normed is None or not arguments or not isinstance(arguments[0], Tensor):
            return
        for tensor in output if isinstance(output, tuple) else (output,):
            if isinstance(tensor, Tensor) and tensor.shape == arguments[0].shape:
                self.normed[tensor.data_ptr()] = (arguments[0], tensor)

    def _router_ends(self, _: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        if _calling_back.get():
            return
        logits = self.layer.router_logits(output).detach()
        self.logits = logits.reshape(-1, logits.shape[-1])

    def _routed(self, experts: Tensor, weights: Tensor) -> None:
        if _calling_back.get():
            return
        self.experts, self.weights = experts.detach(), weights.detach()

    def _block_ends(
        self, _: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any], output: Any
    ) -> None:
        given = arguments[0] if arguments else next(iter(named.values()))
        routing = Routing(logits=self.logits, weights=self.weights, experts=self.experts)
        observation = Observation(
            self.layer,
            input=self._rows(given),
            routing=routing,
            output=self._rows(output[0] if isinstance(output, tuple) else output),
            residual=self._residual(given),
        )
        # Nothing may outlive its pass: it would be held in memory, or mixed into the next.
        del self.logits, self.experts, self.weights
        token = _calling_back.set(True)
        try:
            self.callback(observation)
        finally:
            _calling_back.reset(token)

    def _residual(self, given: Tensor) -> Float[Tensor, "tokens hidden"] | None:
        if self.normed is None:
            return None
        before, _ = self.normed.get(given.data_ptr(), (given, given))
        self.normed.clear()
        return self._rows(before)

    def _rows(self, hidden: Tensor) -> Float[Tensor, "tokens hidden"]:
        return hidden.detach().reshape(-1, self.layer.hidden_size)


def _before(layer: MoELayer) -> Iterator[nn.Module]:
    """The modules of the decoder layer that are no part of the block."""
    within = set(layer.block.modules())
    for module in layer.decoder_layer.modules():
        if module not in within and module is not layer.decoder_layer:
            yield module
