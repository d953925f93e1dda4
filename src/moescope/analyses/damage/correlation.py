"""Whether a measure puts changes in the order of their damage, and how sure that is.

No expert has a part in two changes of a kind, so that each change says something of its own;
documents are shared by all. Errors come from both.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray as Array
from scipy.special import stdtr, stdtrit
from scipy.stats import rankdata

from moescope.measures.bootstrap import FEWEST_UNITS
from moescope.measures.dyadic import FEWEST_EXPERTS, permutation_p

PERMUTATIONS = 1_999
"""Of the damage within strata, behind each p-value."""
_LEVEL = 0.95
_ROUNDING = 1e-9


@dataclass(frozen=True, eq=False, kw_only=True)
class Damage:
    """What changes of one kind cost."""

    estimates: Float[Array, "estimates changes"]
    """Rise of the loss: on all documents, then on resamples of them."""
    strata: Int[Array, " changes"]
    """Changes are put in order within these."""
    documents: int
    """How many documents the rise is measured on."""

    def where(self, known: Bool[Array, " changes"]) -> "Damage":
        """Of some changes."""
        return Damage(
            estimates=self.estimates[:, known],
            strata=self.strata[known],
            documents=self.documents,
        )


class Estimates(NamedTuple):
    """A rank correlation, and the same of parts of what it was measured on."""

    value: float
    """Spearman's, of ranks within strata; NaN where one side does not vary."""
    without: Float[Array, " changes"]
    """Without each change."""
    resampled: Float[Array, " resamples"]
    """With the damage on resampled documents."""
    documents: int
    """How many there are."""


class Interval(NamedTuple):
    """A value with its 95% limits and two-sided p-value; NaN where there are none."""

    value: float
    low: float
    high: float
    p_value: float
    status: str


def correlation(measure: Float[Array, " changes"], damage: Damage) -> Estimates:
    """Rank correlation of a measure and the damage."""
    strata, estimates = damage.strata, damage.estimates
    found = _cosine(_ranks(measure, strata), _ranks(estimates, strata))
    without = _cosine(*(_without_each(values, strata) for values in (measure, estimates[0])))
    return Estimates(float(found[0]), without, found[1:], damage.documents)


def permuted(
    found: Estimates, measure: Float[Array, " changes"], damage: Damage, seed: int
) -> float:
    """Two-sided p-value: how often chance alone lies as far from no correlation.

    Chance is a permutation of the damage within strata, moved by the error over documents (on
    Fisher's z): on others the same changes would have another order, which no permutation knows.
    """
    left, right = (_ranks(v, damage.strata) for v in (measure, damage.estimates[0]))
    random = np.random.default_rng(seed)
    numbers = np.unique(damage.strata, return_inverse=True)[1]
    orders = (numbers + random.random((PERMUTATIONS, len(numbers)))).argsort(1)
    null = _cosine(right[orders], left[numbers.argsort(kind="stable")])
    room = 1 - found.value**2
    error = found.resampled.std(ddof=1) / room if room > _ROUNDING else 0.0
    with np.errstate(divide="ignore"):  # a correlation of 1
        null = np.tanh(np.arctanh(null.clip(-1, 1)) + error * random.standard_normal(PERMUTATIONS))
    return permutation_p(found.value, null)


def rank_correlation(
    one: Float[Array, " changes"], other: Float[Array, " changes"], strata: Int[Array, " changes"]
) -> float:
    """Spearman's, of ranks within strata."""
    return float(_cosine(_ranks(one, strata), _ranks(other, strata)))


def interval(found: Estimates, p_value: float) -> Interval:
    """95% limits of a correlation, by way of Fisher's z and the t distribution.

    Args:
        found: The correlation.
        p_value: As `permuted` gives it.
    """
    if status := _status(found):
        return Interval(found.value, np.nan, np.nan, np.nan, status)
    if 1 - found.value**2 <= _ROUNDING:
        return Interval(found.value, np.nan, np.nan, p_value, "at_limit")
    reach = _quantile(found) * _error(found) / (1 - found.value**2)
    low, high = np.tanh([math.atanh(found.value) - reach, math.atanh(found.value) + reach])
    return Interval(found.value, float(low), float(high), p_value, "ok")


def difference(one: Estimates, other: Estimates) -> Interval:
    """95% limits and p-value of `one - other`, of the same changes: errors go together."""
    rest = Estimates(
        one.value - other.value,
        one.without - other.without,
        one.resampled - other.resampled,
        one.documents,
    )
    if status := _status(rest):
        return Interval(rest.value, np.nan, np.nan, np.nan, status)
    error = _error(rest)
    reach = _quantile(rest) * error
    p_value = float(rest.value == 0)
    if error > 0:
        p_value = float(2 * stdtr(len(rest.without) - 1, -abs(rest.value) / error))
    return Interval(rest.value, rest.value - reach, rest.value + reach, p_value, "ok")


def _ranks(
    values: Float[Array, "*estimates changes"], strata: Int[Array, " changes"]
) -> Float[Array, "*estimates changes"]:
    """Within each stratum, ties at the mean of their ranks, about 0."""
    ranks = np.empty_like(values)
    for stratum in np.unique(strata):
        own = strata == stratum
        ranks[..., own] = rankdata(values[..., own], axis=-1) - (own.sum() + 1) / 2
    return ranks


def _without_each(
    values: Float[Array, " changes"], strata: Int[Array, " changes"]
) -> Float[Array, "left_out changes"]:
    """Twice the ranks without each change; 0 for itself."""
    larger = np.sign(values[:, None] - values) * (strata[:, None] == strata)
    ranks = larger.sum(1) - larger.T
    np.fill_diagonal(ranks, 0)
    return np.asarray(ranks)


def _cosine(
    one: Float[Array, "*#estimates changes"], other: Float[Array, "*#estimates changes"]
) -> Float[Array, "*estimates"]:
    """NaN where one side does not vary."""
    squares = np.square(one).sum(-1) * np.square(other).sum(-1)
    with np.errstate(invalid="ignore"):
        return np.asarray((one * other).sum(-1) / np.sqrt(squares))


def _status(found: Estimates) -> str:
    if len(found.without) < FEWEST_EXPERTS:
        return "few_changes"
    if found.documents < FEWEST_UNITS:
        return "few_documents"
    parts = np.concatenate([[found.value], found.without, found.resampled])
    return "" if np.isfinite(parts).all() else "undefined"


def _error(found: Estimates) -> float:
    """What changes and what documents make it vary adds up.

    Changes by the delete-one jackknife, documents by the bootstrap: ranks move in steps, of which
    leaving out one document at a time makes too much (Efron and Tibshirani 1993, section 11.6).
    """
    n = len(found.without)
    changes = (n - 1) / n * float(np.square(found.without - found.without.mean()).sum())
    return math.sqrt(changes + float(found.resampled.var(ddof=1)))


def _quantile(found: Estimates) -> float:
    return float(stdtrit(len(found.without) - 1, (1 + _LEVEL) / 2))
