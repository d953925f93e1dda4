"""Which experts work on the same tokens: counts of pairs, and what chance alone would give."""

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray as Array

_SWEEPS = 1_000
_SETTLED = 1e-9


def count_pairs(
    counts: Int[Array, "groups first second"],
    groups: Int[Array, " tokens"],
    first: Int[Array, "tokens slots"],
    second: Int[Array, "tokens other_slots"],
) -> None:
    """Add to `counts` each pair of one expert of `first` and one of `second` of the same token.

    Args:
        counts: What was counted before; changed in place.
        groups: Group of every token.
        first: Experts of one layer; -1 in an unused slot.
        second: Experts of the same layer, where the diagonal counts single experts, or another.
    """
    rows = groups[:, None] * counts.shape[1] + first
    cells = rows[:, :, None] * counts.shape[2] + second[:, None, :]
    if first.min(initial=0) < 0 or second.min(initial=0) < 0:
        cells = cells[(first >= 0)[:, :, None] & (second >= 0)[:, None, :]]
    np.add.at(counts.reshape(-1), cells.reshape(-1), 1)


def quasi_independent(
    together: Int[Array, "*rows experts experts"],
) -> Float[Array, "*rows experts experts"]:
    """Expected counts of pairs if experts chose their company by its frequency alone.

    A token never has an expert twice, so that plain independence expects too much of every pair.
    Quasi-independence (Goodman 1968): `a_i a_j` off the diagonal and 0 on it, with the sums of
    rows that were observed. With two experts per token it is the likeliest symmetric model.

    Args:
        together: Tokens that have both experts, symmetric; the diagonal is not looked at.
    """
    off = ~np.eye(together.shape[-1], dtype=bool)
    sums = (together * off).sum(-1).astype(float)
    a = sums / np.sqrt(np.maximum(sums.sum(-1, keepdims=True), 1))
    for _ in range(_SWEEPS):
        others = a.sum(-1, keepdims=True) - a
        # Half a step in the logarithm: a whole one swings from side to side.
        moved = np.sqrt(a * np.divide(sums, others, out=np.zeros_like(a), where=others > 0))
        settled = np.abs(moved - a).max(initial=0) <= _SETTLED * a.max(initial=0)
        a = moved
        if settled:
            break
    return np.asarray(a[..., :, None] * a[..., None, :] * off)


def independent(
    here: Int[Array, "*rows experts"],
    there: Int[Array, "*rows other_experts"],
    tokens: Int[Array, "*rows"],
) -> Float[Array, "*rows experts other_experts"]:
    """Expected counts of pairs of experts of two layers that know nothing of each other."""
    return np.asarray(here[..., :, None] * (there / tokens[..., None])[..., None, :])


def ratio(counts: Int[Array, "*shape"], expected: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Counts over what was expected: the lift, 1 at chance; NaN where nothing was expected."""
    lift = np.full(counts.shape, np.nan)
    return np.asarray(np.divide(counts, expected, out=lift, where=expected > 0))
