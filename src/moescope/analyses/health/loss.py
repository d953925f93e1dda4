"""Which tokens are predicted best and worst, each within its own passage."""

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray as Array

from moescope.captures.read import Capture
from moescope.measures.expert_runs import Passages

DECILE = 10
"""One in so many tokens of a passage is among the best, and one among the worst."""


def marks(loss: Float[Array, " tokens"], passages: Passages) -> Int[Array, " tokens"]:
    """1 for the worst tenth of each passage by loss, -1 for the best, 0 otherwise; as many of both.

    Within a passage: over the whole text, the worst tokens would be those of the hardest documents.
    """
    passage, known = passages.of_token, np.isfinite(loss)
    sizes = np.bincount(passage[known], minlength=len(passages.starts))
    order = np.flatnonzero(known)
    order = order[np.lexsort([loss[order], passage[order]])]
    rank = np.arange(len(order)) - (np.cumsum(sizes) - sizes)[passage[order]]
    size = sizes[passage[order]]
    marked = np.zeros(len(loss), dtype=np.int8)
    marked[order] = (rank >= size - size // DECILE).astype(np.int8) - (rank < size // DECILE)
    return marked


def loss_marks(capture: Capture) -> Int[Array, " tokens"] | None:
    """The marks of all tokens, a byte each; None where no loss was recorded."""
    if "token_loss" not in capture.recorded:
        return None
    loss = capture.token_loss.float().numpy()
    marked = [
        marks(loss[shard.tokens], Passages.of(shard.documents.numpy(), shard.rows.numpy()))
        for shard in capture.token_shards()
    ]
    return np.concatenate(marked)
