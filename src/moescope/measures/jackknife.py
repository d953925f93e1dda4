"""Intervals by leaving out one group of documents at a time.

For numbers that are made from large tables of counts: kept per document they would grow with the
corpus, kept for a fixed number of groups of documents they do not.
"""

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray as Array
from scipy.special import stdtrit

from moescope.measures.bootstrap import FEWEST_UNITS

GROUPS = 32
"""Groups of documents; a document belongs to one of them."""
_LEVEL = 0.95


def whole_and_left_out(
    counts: Int[Array, "groups *shape"], present: Bool[Array, " groups"] | None = None
) -> Int[Array, "estimates *shape"]:
    """Totals over all groups, and then without each that is present, else has any counts.

    Counts that are used together need the same groups, where one of them may have none in some.
    """
    total = counts.sum(0)
    if present is None:
        present = np.asarray(counts.reshape(len(counts), -1).any(1))
    return np.concatenate([total[None], total - counts[present]])


def limits(
    estimates: Float[Array, "estimates *shape"],
) -> tuple[Float[Array, "*shape"], Float[Array, "*shape"]]:
    """95% limits of the first estimate, from the others, which leave out one group each.

    The delete-one-group jackknife (Wolter 2007, chapter 4) with the t quantile for as many groups.
    With 32 documents of very unequal lengths (lognormal, sigma 1.5) the limits of an entropy cover
    90% (1,000 draws), with 300 of them 94%.
    NaN under `FEWEST_UNITS` groups, and where an estimate is not finite.
    """
    left_out = estimates[1:]
    groups = len(left_out)
    if groups < FEWEST_UNITS:
        nothing = np.full(estimates.shape[1:], np.nan)
        return nothing, nothing
    with np.errstate(invalid="ignore"):  # minus infinity, the logarithm of no counts
        squares = np.square(left_out - left_out.mean(0)).sum(0)
    error = np.sqrt((groups - 1) / groups * squares)
    reach = stdtrit(groups - 1, (1 + _LEVEL) / 2) * error
    return np.asarray(estimates[0] - reach), np.asarray(estimates[0] + reach)


def log_limits(
    estimates: Float[Array, "estimates *shape"],
) -> tuple[Float[Array, "*shape"], Float[Array, "*shape"]]:
    """The same for positive numbers, by way of their logarithms."""
    with np.errstate(divide="ignore"):  # no counts
        low, high = limits(np.log(estimates))
    return np.exp(low), np.exp(high)
