"""From the residual stream to logits: final norm and unembedding, as the model runs them."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from moescope.errors import ModelError
from moescope.models.conformance import HALF_TOLERANCE, TOLERANCE, sample_ids
from moescope.models.patching import Forward, wrapped
from moescope.models.view import MoEModel


@dataclass(frozen=True, eq=False, kw_only=True)
class Readout:
    """Decodes states of the residual stream as the model decodes its last one.

    Found by structure and proved (decision 0009): the norm is the module whose output the trunk of
    the model returns; the unembedding is the forward pass of the model itself with the output of
    its trunk replaced, so that ties, biases, scales and soft-caps are the model's own. In an
    encoder-decoder it is the decoder's.
    """

    model: MoEModel
    """Whose norm and unembedding these are."""
    norm: nn.Module
    """The final norm."""
    trunk: nn.Module
    """What the language-model head is put on."""
    replayed: dict[nn.Module, Any]
    """What the trunk, and modules that ran before it, gave in a small pass."""
    dtype: torch.dtype
    """Of the states that the norm is given."""
    device: torch.device
    """Of the same."""
    vocabulary: int
    """Number of logits."""

    @classmethod
    def of(cls, model: MoEModel) -> "Readout":
        """Find it, and prove it on a few random tokens (fixed seed).

        Raises:
            ModelError: The model has no language-model head, no final norm, or does something else
                between its last state and its logits.
        """
        with model.evaluating(), torch.no_grad():
            seen, logits = _passed(model)
            trunk, norm = _trunk_and_norm(model, seen)
            state = seen[norm].given
            before = [module for module in model.model.children() if _ended(seen, module, trunk)]
            readout = cls(
                model=model,
                norm=norm,
                trunk=trunk,
                replayed={module: seen[module].output for module in (*before, trunk)},
                dtype=state.dtype,
                device=state.device,
                vocabulary=logits.shape[-1],
            )
            readout._prove(state.flatten(0, -2), logits.flatten(0, -2))
        return readout

    def normed(self, states: Float[Tensor, "tokens hidden"]) -> Float[Tensor, "tokens hidden"]:
        """States after the final norm, its gain included."""
        given: Tensor = self.norm(self._beside(states)[None])
        return given[0]

    def unembed(self, normed: Float[Tensor, "tokens hidden"]) -> Float[Tensor, "tokens vocabulary"]:
        """Logits of normed states: head, bias, scale and soft-cap."""
        states = self._beside(normed)[None]
        with ExitStack() as stack:
            for module, output in self.replayed.items():
                given = _with_first(output, states) if module is self.trunk else output
                stack.enter_context(wrapped(module, _returning(given)))
            one_token = torch.zeros(1, 1, dtype=torch.int64)
            logits: Tensor = self.model.forward(one_token, head=True).logits
        return logits[0]

    def logits(self, states: Float[Tensor, "tokens hidden"]) -> Float[Tensor, "tokens vocabulary"]:
        """Logits of states of the residual stream."""
        return self.unembed(self.normed(states))

    def _beside(self, states: Tensor) -> Tensor:
        return states.to(self.device, self.dtype)

    def _prove(self, states: Tensor, logits: Tensor) -> None:
        decoded = self.logits(states).double()
        error = float("inf")
        if decoded.shape == logits.shape:
            error = ((decoded - logits).norm() / logits.double().norm()).item()
        tolerance = TOLERANCE if self.dtype.itemsize >= torch.float32.itemsize else HALF_TOLERANCE
        if not error <= tolerance:
            raise ModelError(
                f"the model {self.model.name!r} does more to its last state than norm and unembed "
                "it",
                got=f"relative error {error:.3g} of its logits",
                expected=f"at most {tolerance:g}",
            )


@dataclass(eq=False)
class _Call:
    """The last call of a module in a pass."""

    number: int
    """How many calls ended before."""
    output: Any
    given: Any = field(default=None)
    """The first argument, if there is one."""

    @property
    def first(self) -> Any:
        """The output, or the first of several."""
        several = not isinstance(self.output, Tensor) and self.output
        return self.output[0] if several else self.output


def _passed(model: MoEModel) -> tuple[dict[nn.Module, _Call], Tensor]:
    """The last call of every module in one small forward pass, and the logits.

    Raises:
        ModelError: There is no language-model head.
    """
    seen: dict[nn.Module, _Call] = {}

    def note(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        seen[module] = _Call(len(seen), output, arguments[0] if arguments else None)

    with _hooked(model.model, note):
        output = model.forward(sample_ids(model), head=True)
    network: Any = model.model
    if "logits" not in output or network.get_output_embeddings() is None:
        raise ModelError(
            f"the model {model.name!r} predicts no tokens",
            got=f"a {type(model.model).__name__}",
            expected="a model with a language-model head",
        )
    return seen, output.logits


@contextmanager
def _hooked(model: nn.Module, note: Callable[..., None]) -> Iterator[None]:
    with ExitStack() as stack:
        for module in model.modules():
            stack.callback(module.register_forward_hook(note).remove)
        yield


def _trunk_and_norm(model: MoEModel, seen: dict[nn.Module, _Call]) -> tuple[nn.Module, nn.Module]:
    """The outermost module around the layers that returns what a norm beside them gave.

    Raises:
        ModelError: There is none.
    """
    decoder = [layer for layer in model.layers if layer.stack == "decoder"]
    layers = {part for layer in decoder for part in layer.decoder_layer.modules()}
    for trunk in model.model.modules():
        within = set(trunk.modules())
        around = bool(decoder) and decoder[-1].router in within
        if trunk is model.model or trunk in layers or trunk not in seen or not around:
            continue
        for module in trunk.modules():
            if module not in layers and _turns_into(seen.get(module), seen[trunk].first):
                return trunk, module
    raise ModelError(
        f"no final norm was found in the model {model.name!r}",
        got=f"a {type(model.model).__name__}",
        expected="sparse decoder layers, and a norm of what the last layer returns",
    )


def _turns_into(call: _Call | None, final: Any) -> bool:
    """Whether a call made `final` of another tensor like it."""
    return (
        call is not None
        and isinstance(call.output, Tensor)
        and isinstance(call.given, Tensor)
        and isinstance(final, Tensor)
        and call.output.data_ptr() == final.data_ptr() != call.given.data_ptr()
        and call.output.shape == call.given.shape == final.shape
    )


def _ended(seen: dict[nn.Module, _Call], module: nn.Module, trunk: nn.Module) -> bool:
    """Whether a module ran to its end before the trunk did and is no part of it."""
    if module not in seen or any(part is trunk for part in module.modules()):
        return False
    return seen[module].number < seen[trunk].number


def _returning(output: Any) -> Callable[[Forward], Forward]:
    return lambda _: lambda *arguments, **named: output


def _with_first(output: Any, states: Tensor) -> Any:
    """The output of a trunk with other states in it."""
    if isinstance(output, dict):
        first = next(iter(output))
        return type(output)(**{**output, first: states})
    return (states, *output[1:]) if isinstance(output, tuple) else states
