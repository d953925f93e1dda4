"""Statistics of pairs: what is said of pairs of experts is not independent, for they share experts.

Tests permute experts, never pairs; intervals leave out experts, never pairs.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float
from numpy import ndarray as Array
from scipy.special import stdtrit

FEWEST_EXPERTS = 5
"""Experts below which a mean over their pairs has no interval: with fewer it covers too little."""
_LEVEL = 0.95
_CELLS_AT_ONCE = 2**22


class PairMean(NamedTuple):
    """A mean over pairs of experts, with its 95% limits."""

    mean: float
    """Over the pairs there are; NaN without any."""
    low: float
    """Lower limit; NaN under `FEWEST_EXPERTS` on a side."""
    high: float
    """Upper limit."""
    n_pairs: int
    """Pairs in the mean."""


def within(values: Float[Array, "experts experts"]) -> Float[Array, "experts experts"]:
    """Values of pairs within a layer, each pair once: NaN elsewhere."""
    return np.where(np.triu(np.ones(values.shape, dtype=bool), 1), values, np.nan)


def pair_mean(values: Float[Array, "experts others"], *, same: bool) -> PairMean:
    """Mean over pairs, with a 95% interval over experts.

    The delete-one jackknife, one expert with all its pairs at a time (as for U-statistics: Arvesen
    1969), and the t quantile for as many experts. Where experts differ as such it is exact in
    large layers; where only pairs differ the variance comes out up to twice too large (Efron and
    Stein 1981), never too small. Of two layers the jackknives of both sides add up. It asks how
    the mean would vary over experts as these: over the pairs that there are it is exact.

    Args:
        values: By pair; NaN for those that were not measured, or are no pairs.
        same: Whether rows and columns are the same experts.
    """
    present = np.isfinite(values)
    total, number = np.where(present, values, 0).sum(), int(present.sum())
    mean = total / number if number else np.nan
    if same:
        sides = [_left_out(values, present, 0) + _left_out(values, present, 1)]
    else:
        sides = [_left_out(values, present, axis) for axis in (0, 1)]
    variance, degrees = 0.0, np.inf
    for side in sides:
        used = side[:, 1] > 0
        experts = int(used.sum())
        if experts < FEWEST_EXPERTS or (side[used, 1] >= number).any():
            return PairMean(mean, np.nan, np.nan, number)
        rest = (total - side[used, 0]) / (number - side[used, 1])
        variance += (experts - 1) / experts * np.square(rest - rest.mean()).sum()
        degrees = min(degrees, experts - 1)
    reach = float(stdtrit(degrees, (1 + _LEVEL) / 2)) * np.sqrt(variance)
    return PairMean(mean, mean - reach, mean + reach, number)


def _left_out(
    values: Float[Array, "experts others"], present: Bool[Array, "experts others"], axis: int
) -> Float[Array, "side 2"]:
    """Sum and number of the pairs of each expert of one side."""
    return np.stack([np.where(present, values, 0).sum(1 - axis), present.sum(1 - axis)], axis=1)


class Mantel(NamedTuple):
    """How two similarities of the same experts go together."""

    r: float
    """Pearson's correlation over pairs; NaN where one of them does not vary."""
    p_value: float
    """Share of permutations of the experts that give a correlation as far from 0, this included."""
    n_pairs: int
    """Pairs of experts."""
    null: Float[Array, " permutations"]
    """The correlations of the permutations."""


def mantel(
    one: Float[Array, "experts experts"],
    other: Float[Array, "experts experts"],
    *,
    permutations: int,
    seed: int | list[int],
) -> Mantel:
    """Correlation of two symmetric similarities, tested by permuting experts (Mantel 1967).

    Two-sided; p at least `1 / (1 + permutations)`.
    """
    experts = len(one)
    above = np.triu_indices(experts, 1)
    left, right = _standardised(one[above]), _standardised(other[above])
    r = float(left @ right) if len(left) else np.nan
    if not np.isfinite(r):
        return Mantel(np.nan, np.nan, len(left), np.full(permutations, np.nan))
    turned = np.zeros_like(other)
    turned[above] = right
    turned += turned.T
    random = np.random.default_rng(seed)
    null = np.empty(permutations)
    size = max(1, _CELLS_AT_ONCE // len(left))
    for start in range(0, permutations, size):
        number = min(size, permutations - start)
        orders = random.permuted(np.tile(np.arange(experts), (number, 1)), axis=1)
        null[start : start + number] = turned[orders[:, above[0]], orders[:, above[1]]] @ left
    return Mantel(r, permutation_p(r, null), len(left), null)


def permutation_p(value: float, null: Float[Array, " permutations"]) -> float:
    """Share of a null, `value` included, that lies as far from 0; rounding is no difference."""
    return float((1 + (np.abs(null) >= abs(value) - 1e-12).sum()) / (1 + len(null)))


def _standardised(values: Float[Array, " pairs"]) -> Float[Array, " pairs"]:
    """Mean 0 and norm 1; NaN where they do not vary."""
    if not len(values):
        return values
    moved = values - values.mean()
    norm = np.linalg.norm(moved)
    rounding = 1e-12 * np.linalg.norm(values)  # no variation
    return moved / norm if norm > rounding else np.full(len(values), np.nan)
