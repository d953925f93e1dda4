"""Decodes the columns of a lens, a few positions at a time, and compares them with the end."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from moescope.decoding.columns import Column, LayerStates
from moescope.models.readout import Readout

_VALUES_AT_ONCE = 1 << 24
"""Logits in fp32 of one column at a time: 64 MiB, however many positions there are."""

Translation = Callable[[int, Float[Tensor, "tokens hidden"]], Float[Tensor, "tokens hidden"]]
"""Number of a layer and states of the residual stream there; states as the last layer has them."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Decoded:
    """What one column of one layer predicts at some positions."""

    number: int
    """Place of the layer in the order of the pass."""
    states: LayerStates
    """Of the layer, at these positions."""
    column: Column
    """What was decoded."""
    log_probabilities: Float[Tensor, "tokens vocabulary"]
    """Over the whole vocabulary, in nats."""
    final: Float[Tensor, "tokens vocabulary"]
    """The model's own."""
    positions: slice
    """Which of the positions that were given."""

    @property
    def divergence(self) -> Float[Tensor, " tokens"]:
        """KL(final || column) in nats."""
        return divergence(self.final, self.log_probabilities)

    @property
    def agreement(self) -> Float[Tensor, " tokens"]:
        """1 where the likeliest token is that of the model, 0 elsewhere."""
        return (self.log_probabilities.argmax(-1) == self.final.argmax(-1)).float()

    def loss(self, ids: Int64[Tensor, " tokens"]) -> Float[Tensor, " tokens"]:
        """Negative log-likelihood of these tokens, in nats."""
        return -self.log_probabilities.gather(1, ids[:, None])[:, 0]


@torch.no_grad()
def decoded(
    readout: Readout,
    last: Float[Tensor, "tokens hidden"],
    layers: Sequence[LayerStates],
    translation: Translation | None = None,
) -> Iterator[Decoded]:
    """Every column of every layer, for a few positions after the other.

    One product with the unembedding per layer, column and chunk of positions, and one for the
    model's own prediction; no more than a few such products are held at a time.

    Args:
        readout: The model's own.
        last: The last state of the stream.
        layers: The states of each layer at the same positions.
        translation: Put before the readout for states of the stream (a tuned lens).
    """
    for some in chunks(readout, len(last)):
        final = log_probabilities(readout, last[some])
        for number, layer in enumerate(layers):
            states = layer[some]
            for column, stream in states.columns():
                if translation is not None and column.has_stream:
                    stream = translation(layer.ending.layer.index, stream)
                yield Decoded(
                    number=number,
                    states=states,
                    column=column,
                    log_probabilities=log_probabilities(readout, stream),
                    final=final,
                    positions=some,
                )


def chunks(readout: Readout, tokens: int) -> Iterator[slice]:
    """So few positions at a time that their logits stay small."""
    size = max(1, _VALUES_AT_ONCE // readout.vocabulary)
    return (slice(start, start + size) for start in range(0, tokens, size))


def log_probabilities(
    readout: Readout, states: Float[Tensor, "tokens hidden"]
) -> Float[Tensor, "tokens vocabulary"]:
    """What states of the residual stream predict, over the whole vocabulary, in nats."""
    return readout.logits(states).float().log_softmax(-1)


def divergence(
    final: Float[Tensor, "tokens vocabulary"], own: Float[Tensor, "#tokens vocabulary"]
) -> Float[Tensor, " tokens"]:
    """KL(final || own) in nats, from log probabilities."""
    return (final.exp() * (final - own)).sum(-1).clamp_min(0)  # rounding may go below
