"""Whether a measure puts changes in the order of their damage, and how sure that is.

What is done to pairs shares experts, and everything shares documents: errors come from leaving out
experts, with all that is done to them, and documents.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray as Array
from scipy.special import stdtr, stdtrit

from moescope.measures.bootstrap import FEWEST_UNITS
from moescope.measures.dyadic import FEWEST_EXPERTS, permutation_p

PERMUTATIONS = 1_999
"""Of the damage within strata, behind each p-value."""
_LEVEL = 0.95


@dataclass(frozen=True, eq=False, kw_only=True)
class Damage:
    """What changes of one kind cost."""

    estimates: Float[Array, "estimates changes"]
    """Rise of the loss: on all documents, then without each group of them."""
    strata: Int[Array, " changes"]
    """Changes are put in order within these."""
    members: Bool[Array, "experts changes"]
    """Which experts each is done to."""


class Estimates(NamedTuple):
    """A rank correlation, and the same without parts of what it was measured on."""

    value: float
    """Spearman's, of ranks within strata; NaN where one side does not vary."""
    without_experts: Float[Array, " experts"]
    """Without each expert."""
    without_changes: Float[Array, " changes"]
    """Without each single change."""
    without_documents: Float[Array, " groups"]
    """Without each group of documents."""
    shared: bool
    """Whether an expert has a part in several changes."""


class Interval(NamedTuple):
    """A value with its 95% limits and two-sided p-value; NaN where there are none."""

    value: float
    low: float
    high: float
    p_value: float
    status: str


def correlation(
    measure: Float[Array, " changes"], damage: Damage, known: Bool[Array, " changes"]
) -> Estimates:
    """Rank correlation of a measure and the damage, over the changes for which it is known."""
    experts = damage.members[damage.members[:, known].any(1)]
    single = np.eye(len(known), dtype=bool)[known]
    weights = np.concatenate([known[None], known & ~experts, known & ~single]).astype(float)
    same = damage.strata[:, None] == damage.strata
    left = _signs(measure, same)
    right = [_signs(values, same) for values in damage.estimates]
    found = _correlations(left, right[0], weights)
    others = [_correlations(left, signs, weights[:1])[0] for signs in right[1:]]
    of_experts, of_changes = np.split(found[1:], [len(experts)])
    shared = bool((experts[:, known].sum(1) > 1).any())
    return Estimates(float(found[0]), of_experts, of_changes, np.array(others), shared)


def permuted(
    measure: Float[Array, " changes"],
    damage: Damage,
    known: Bool[Array, " changes"],
    seed: int,
) -> float:
    """Share of permutations of the damage within strata that lie as far from no correlation.

    It holds exactly where no expert has a part in two changes.
    """
    strata = damage.strata[known]
    same = strata[:, None] == strata
    left, right = (_signs(v[known], same).sum(1) for v in (measure, damage.estimates[0]))
    random = np.random.default_rng(seed)
    numbers = np.unique(strata, return_inverse=True)[1]
    orders = (numbers + random.random((PERMUTATIONS, len(numbers)))).argsort(1)
    null = right[orders] @ left[numbers.argsort(kind="stable")]
    return permutation_p(float(left @ right), null)


def rank_correlation(
    one: Float[Array, " changes"], other: Float[Array, " changes"], strata: Int[Array, " changes"]
) -> float:
    """Spearman's, of ranks within strata."""
    same = strata[:, None] == strata
    weights = np.ones((1, len(one)))
    return float(_correlations(_signs(one, same), _signs(other, same), weights)[0])


def interval(found: Estimates, p_permuted: float) -> Interval:
    """95% limits of a correlation, by way of Fisher's z and the t distribution, and a p-value.

    Where experts have a part in several changes, permutations of these know nothing of it: the
    p-value is then at least that of the error of the limits.

    Args:
        found: The correlation.
        p_permuted: As `permuted` gives it.
    """
    if status := _status(found):
        return Interval(found.value, np.nan, np.nan, np.nan, status)
    if abs(found.value) > 1 - 1e-9:
        return Interval(found.value, np.nan, np.nan, p_permuted, "at_limit")
    z = math.atanh(found.value)
    error = math.sqrt(_variance(found)) / (1 - found.value**2)
    reach = _quantile(found) * error
    low, high = np.tanh([z - reach, z + reach])
    if found.shared:
        p_permuted = max(p_permuted, _p_value(z, error, found))
    return Interval(found.value, float(low), float(high), p_permuted, "ok")


def difference(one: Estimates, other: Estimates) -> Interval:
    """95% limits and p-value of `one - other`, of the same changes: errors go together."""
    rest = Estimates(
        one.value - other.value,
        one.without_experts - other.without_experts,
        one.without_changes - other.without_changes,
        one.without_documents - other.without_documents,
        one.shared,
    )
    if status := _status(rest):
        return Interval(rest.value, np.nan, np.nan, np.nan, status)
    error = math.sqrt(_variance(rest))
    reach = _quantile(rest) * error
    p_value = _p_value(rest.value, error, rest)
    return Interval(rest.value, rest.value - reach, rest.value + reach, p_value, "ok")


def _signs(
    values: Float[Array, " changes"], same: Bool[Array, "changes changes"]
) -> Float[Array, "changes changes"]:
    """Which is larger, by pair of one stratum: a row's sum is twice its centred rank there."""
    return np.asarray(np.nan_to_num(np.sign(values[:, None] - values)) * same)


def _correlations(
    left: Float[Array, "changes changes"],
    right: Float[Array, "changes changes"],
    weights: Float[Array, "estimates changes"],
) -> Float[Array, " estimates"]:
    """Of the ranks that those have which count, by estimate; NaN where one side does not vary."""
    one, other = weights @ left.T, weights @ right.T
    squares = (weights * one**2).sum(1) * (weights * other**2).sum(1)
    products = (weights * one * other).sum(1)
    with np.errstate(invalid="ignore"):
        found: Array = products / np.sqrt(squares)
    return found


def _status(found: Estimates) -> str:
    if not np.isfinite(found.value) or not np.isfinite(found.without_experts).all():
        return "undefined"
    if len(found.without_experts) < FEWEST_EXPERTS:
        return "few_experts"
    if len(found.without_documents) < FEWEST_UNITS:
        return "few_documents"
    return "" if np.isfinite(found.without_documents).all() else "undefined"


def _variance(found: Estimates) -> float:
    """By the delete-one jackknife: what experts and what documents make it vary adds up.

    A change of a pair is left out with either expert: what is its own counts once (Cameron, Gelbach
    and Miller 2011), and no less than it would alone.
    """
    experts, changes, documents = (
        (len(rest) - 1) / len(rest) * float(np.square(rest - rest.mean()).sum())
        for rest in (found.without_experts, found.without_changes, found.without_documents)
    )
    return max(changes, experts - changes) + documents


def _quantile(found: Estimates) -> float:
    return float(stdtrit(len(found.without_experts) - 1, (1 + _LEVEL) / 2))


def _p_value(value: float, error: float, found: Estimates) -> float:
    if error == 0:
        return 0.0 if value else 1.0
    return float(2 * stdtr(len(found.without_experts) - 1, -abs(value) / error))
