"""How much of what a block puts out arrives at the final norm by itself: measured, not assumed."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from moescope.errors import ModelError
from moescope.models.conformance import sample_ids
from moescope.models.patching import Forward, wrapped
from moescope.models.readout import Readout
from moescope.models.view import MoELayer, MoEModel

TOLERANCE, HALF_TOLERANCE = 1e-3, 2e-2  # relative, of what the direct path is not


def direct_rates(model: MoEModel, readout: Readout) -> dict[MoELayer, float]:
    """What a change of the output of each sparse block is multiplied with on its way to the end.

    In a small pass of random tokens everything that has a matrix is held at what it gave, norms and
    additions are not: what then still reaches the final norm when the output of one block is moved
    has gone there directly. 1 in most families, another number where outputs or the stream are
    scaled (Granite), 0 for layers of an encoder.

    Raises:
        ModelError: What arrives is not a multiple of what was moved, as where the output of the
            block is normed first (Gemma 4), or where there are several streams.
    """
    ids = sample_ids(model)[:1].repeat(len(model.layers) + 1, 1)
    with _recorded(model) as outputs:
        states = _final(model, readout, ids)
    largest = torch.finfo(states.dtype).max / 4
    reach = min(2.0**12 * states.float().abs().max().item(), largest)
    moves = torch.randn(states.shape[-1], generator=torch.Generator().manual_seed(0)).sign() * reach
    with _held(outputs), _moved(model, moves):
        arrived = _final(model, readout, ids).float().cpu()
    half = states.dtype.itemsize < torch.float32.itemsize
    most = HALF_TOLERANCE if half else TOLERANCE
    return {
        layer: _rate(layer, arrived[row] - arrived[0], moves, most)
        for row, layer in enumerate(model.layers, start=1)
    }


def _rate(
    layer: MoELayer,
    arrived: Float[Tensor, "tokens hidden"],
    moved: Float[Tensor, " hidden"],
    most: float,
) -> float:
    if layer.stack == "encoder" and not arrived.any():
        return 0.0
    rate = float((arrived @ moved).mean() / moved.square().sum())
    left = float((arrived - rate * moved).norm(dim=1).max() / moved.norm())
    if not rate or not left <= most * abs(rate):
        raise ModelError(
            f"the direct contribution of the experts of {layer.stack} layer {layer.index} "
            f"({layer.family}) is not defined: what its block puts out does not reach the final "
            "norm as a multiple of itself",
            got=f"a relative rest of {left / abs(rate):.2g}" if rate else "nothing arrives",
            expected=f"at most {most:g}",
        )
    return rate


def _final(
    model: MoEModel, readout: Readout, ids: Int[Tensor, "rows length"]
) -> Float[Tensor, "rows length hidden"]:
    """What the final norm is given."""
    with final_states(readout) as states:
        model.forward(ids)
    return states[0]


@contextmanager
def final_states(readout: Readout) -> Iterator[list[Tensor]]:
    """Note what the final norm is given, pass by pass."""
    seen: list[Tensor] = []
    handle = readout.norm.register_forward_pre_hook(
        lambda _, arguments: seen.append(arguments[0].detach())
    )
    try:
        yield seen
    finally:
        handle.remove()


def _with_matrices(model: MoEModel) -> Iterator[nn.Module]:
    """Outermost modules that hold a matrix themselves, and no sparse block."""
    blocks = {layer.block for layer in model.layers}

    def within(module: nn.Module) -> Iterator[nn.Module]:
        own = any(p.ndim > 1 for p in module.parameters(recurse=False))
        if own and blocks.isdisjoint(module.modules()):
            yield module
        else:
            for child in module.children():
                yield from within(child)

    yield from dict.fromkeys(within(model.model))


@contextmanager
def _recorded(model: MoEModel) -> Iterator[dict[nn.Module, list[Any]]]:
    """What each of these modules gives, call by call."""
    outputs: dict[nn.Module, list[Any]] = defaultdict(list)
    with ExitStack() as stack:
        for module in _with_matrices(model):
            hook = lambda module, _, output: outputs[module].append(_copied(output))  # noqa: E731
            stack.callback(module.register_forward_hook(hook).remove)
        yield outputs


@contextmanager
def _held(outputs: dict[nn.Module, list[Any]]) -> Iterator[None]:
    """Have them give the same again."""
    with ExitStack() as stack:
        for module, given in outputs.items():
            stack.enter_context(wrapped(module, _replaying(iter(given))))
        yield


def _replaying(given: Iterator[Any]) -> Callable[[Forward], Forward]:
    return lambda _: lambda *arguments, **named: _copied(next(given))


def _copied(output: Any) -> Any:
    """What somebody writes into later stays what it was."""
    if isinstance(output, Tensor):
        return output.clone()
    return tuple(map(_copied, output)) if isinstance(output, tuple) else output


@contextmanager
def _moved(model: MoEModel, moves: Float[Tensor, " hidden"]) -> Iterator[None]:
    """Add to the output of the first block in the second row, of the second in the third."""
    rows = len(model.layers) + 1
    with ExitStack() as stack:
        for row, layer in enumerate(model.layers, start=1):
            stack.callback(layer.block.register_forward_hook(_adding(row, rows, moves)).remove)
        yield


def _adding(row: int, rows: int, moves: Tensor) -> Callable[..., Any]:
    def add(_: nn.Module, __: Any, output: Any) -> Any:
        first = (output[0] if isinstance(output, tuple) else output).clone()
        # Some blocks return one row per token.
        first.view(rows, -1, len(moves))[row] += moves.to(first)
        return (first, *output[1:]) if isinstance(output, tuple) else first

    return add
