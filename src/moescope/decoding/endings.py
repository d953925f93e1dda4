"""What a decoder layer makes of the output of its sparse block, found by what passes."""

from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from moescope.errors import ModelError
from moescope.models.conformance import HALF_TOLERANCE, TOLERANCE, sample_ids
from moescope.models.observe import Observation, observe
from moescope.models.view import Function, MoELayer, MoEModel


@dataclass(frozen=True, eq=False, kw_only=True)
class Ending:
    """The end of one decoder layer."""

    layer: MoELayer
    """Its sparse block."""
    module: nn.Module
    """The module whose output is the residual stream after the layer."""
    adds: Function | None
    """What the layer adds to the stream for an output of its block, the shared expert included: as
    it is, times a constant, or normed. None where the layer does something else with it."""


@torch.no_grad()
def endings(model: MoEModel) -> list[Ending]:
    """Every decoder layer with a sparse block, proved on a few random tokens (fixed seed).

    Raises:
        ModelError: No decoder layer has one, or the layers pass on several streams.
    """
    passes = {layer: _Pass(layer) for layer in model.layers if layer.stack == "decoder"}
    if not passes:
        raise ModelError(
            f"the model {model.name!r} has no sparse layer in its decoder",
            remedy="Nothing decodes the states of an encoder to tokens",
        )

    def observed(observation: Observation) -> None:
        passes[observation.layer].observation = observation

    with model.evaluating(), observe(list(passes), observed, residual=True), ExitStack() as stack:
        for seen in passes.values():
            seen.enter(stack)
        model.forward(sample_ids(model))
    return [seen.ending() for seen in passes.values()]


@dataclass(eq=False)
class _Pass:
    """What passed through one decoder layer."""

    layer: MoELayer
    calls: list[tuple[nn.Module, Any, Any]] = field(default_factory=list)
    """Modules that are no part of the block, the first argument and the output of each, in the
    order in which they ended."""
    observation: Observation = field(init=False)

    def enter(self, stack: ExitStack) -> None:
        within = set(self.layer.block.modules())
        for module in self.layer.decoder_layer.modules():
            if module not in within:
                stack.callback(module.register_forward_hook(self._note).remove)

    def _note(self, module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        self.calls.append((module, arguments[0] if arguments else None, output))

    def ending(self) -> Ending:
        """What the layer does, if it is one of the things that are understood."""
        layer, seen = self.layer, self.observation
        assert seen.residual is not None
        module, _, output = self.calls[-1]  # what ends last is around all others
        stream = first_tensor(output)
        if stream.numel() != seen.residual.numel():
            raise ModelError(
                f"the layers of {layer.family} pass on several streams, which are mixed before "
                "they are decoded",
                got=f"states of shape {tuple(stream.shape)}",
                expected="one stream, as wide as the model",
            )
        given = seen.output
        shared = None if layer.shared_in_block else layer.shared_output(seen.input)
        given = given if shared is None else given + shared
        for adds in self._candidates(module, given, stream.view_as(given) - seen.residual):
            if _equals(seen.residual + adds(given), stream.view_as(given), seen.residual):
                return Ending(layer=layer, module=module, adds=adds)
        return Ending(layer=layer, module=module, adds=None)

    def _candidates(self, whole: nn.Module, given: Tensor, added: Tensor) -> list[Function]:
        """The output times a number that the layer holds, or what a norm makes of it."""
        held = [v for v in vars(whole).values() if isinstance(v, float | int)]
        factor = ((added * given).sum() / given.square().sum()).item()
        nearest = min([1.0, *held], key=lambda number: abs(number - factor))
        norms = [
            module
            for module, before, after in self.calls[:-1]
            if _is_norm(module, self.layer.hidden_size)
            and isinstance(before, Tensor)
            and isinstance(after, Tensor)
            and before.shape == after.shape
            and before.numel() == given.numel()
            and torch.equal(before.reshape(given.shape), given)
        ]
        times = partial(torch.mul, nearest)
        return [times, *(partial(_normed, norm, given.dtype) for norm in norms)]


def _is_norm(module: nn.Module, width: int) -> bool:
    """Nothing but a gain and a bias, so that no token can see another."""
    parameters = list(module.parameters())
    return not list(module.children()) and all(p.shape == (width,) for p in parameters)


def first_tensor(output: Any) -> Tensor:
    """The states within what a layer returned."""
    tensor: Tensor = output if isinstance(output, Tensor) else output[0]
    return tensor


def _normed(
    norm: nn.Module, dtype: torch.dtype, x: Float[Tensor, "tokens hidden"]
) -> Float[Tensor, "tokens hidden"]:
    output: Tensor = norm(x.to(dtype))
    return output.to(x)


def _equals(rebuilt: Tensor, stream: Tensor, before: Tensor) -> bool:
    """Up to rounding of what was added, and of the stream."""
    half = stream.dtype.itemsize < torch.float32.itemsize
    error, added = (
        (a.float() - b.float()).norm() for a, b in ((rebuilt, stream), (stream, before))
    )
    rounding = torch.finfo(stream.dtype).eps * stream.float().norm()
    return bool(error <= (HALF_TOLERANCE if half else TOLERANCE) * added + rounding)
