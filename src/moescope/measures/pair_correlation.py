"""Whether two similarities of experts put the pairs in the same order.

Pairs share experts: the test permutes experts, never pairs, and limits leave out experts.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from numpy import ndarray as Array
from scipy.special import stdtrit
from scipy.stats import rankdata

from moescope.measures.bootstrap import FEWEST_UNITS
from moescope.measures.dyadic import FEWEST_EXPERTS, mantel, permutation_p

_LEVEL = 0.95


class PairCorrelation(NamedTuple):
    """A rank correlation over the pairs of some experts, and what its error is made from."""

    rho: float
    """Spearman's; NaN where one of them does not vary."""
    p_value: float
    """Share of permutations of the experts that give a correlation as far from 0, this included."""
    without_experts: Float[Array, " experts"]
    """The same without each expert."""
    without_documents: Float[Array, " groups"]
    """The same without each group of documents."""
    n_pairs: int
    """Pairs of experts."""
    null: Float[Array, " permutations"]
    """The correlations of the permutations."""


def pair_correlation(
    one: Float[Array, "experts experts"],
    other: Float[Array, "estimates experts experts"],
    *,
    permutations: int,
    seed: int | list[int],
) -> PairCorrelation:
    """Spearman's correlation of two similarities over pairs of experts.

    The test is Mantel's (1967) on ranks: two-sided, p at least `1 / (1 + permutations)`.

    Args:
        one: A symmetric similarity.
        other: Another, measured on text: as it is, then without each group of documents.
        permutations: Permutations of the experts behind the p-value.
        seed: Of these.
    """
    experts = len(one)
    first, second = np.triu_indices(experts, 1)
    pairs, others = one[first, second], other[:, first, second]
    found = mantel(
        *(_of_pairs(rankdata(values), experts) for values in (pairs, others[0])),
        permutations=permutations,
        seed=seed,
    )
    kept = [(first != expert) & (second != expert) for expert in range(experts)]
    return PairCorrelation(
        rho=found.r,
        p_value=found.p_value,
        without_experts=np.concatenate([_spearman(pairs[rest], others[:1, rest]) for rest in kept]),
        without_documents=_spearman(pairs, others[1:]),
        n_pairs=len(pairs),
        null=found.null,
    )


class MeanCorrelation(NamedTuple):
    """A mean over layers of rank correlations, with its 95% limits."""

    value: float
    """Mean."""
    value_low: float
    """Lower limit; NaN where there is none."""
    value_high: float
    """Upper limit."""
    p_value: float
    """Two-sided; experts of all layers are permuted at once."""


def mean_correlation(found: Sequence[PairCorrelation]) -> MeanCorrelation:
    """Mean over layers (or the correlation of one), with a 95% interval over experts and documents.

    The delete-one jackknife of both: what the experts of each layer and the documents, the same
    for all layers, make it vary adds up. Limits are taken on Fisher's z and turned back, with the
    t quantile for as many experts. Of one layer of 8 or 16 experts they cover at least 96% (1,000
    draws; correlations of 0 to 0.98), of 64 experts at least 93% (300 draws).

    NaN limits under `FEWEST_EXPERTS` experts or `FEWEST_UNITS` groups of documents, and at 1.
    """
    value = float(np.mean([one.rho for one in found]))
    p_value = permutation_p(value, np.mean([one.null for one in found], axis=0))
    experts = min(len(one.without_experts) for one in found)
    left_out = np.mean([one.without_documents for one in found], axis=0)
    if experts < FEWEST_EXPERTS or len(left_out) < FEWEST_UNITS or not abs(value) < 1:
        return MeanCorrelation(value, np.nan, np.nan, p_value)
    of_experts = sum(_variance(one.without_experts) for one in found) / len(found) ** 2
    error = np.sqrt(of_experts + _variance(left_out)) / (1 - value**2)
    reach = float(stdtrit(experts - 1, (1 + _LEVEL) / 2)) * error
    low, high = np.tanh(np.arctanh(value) + np.array([-reach, reach]))
    return MeanCorrelation(value, float(low), float(high), p_value)


def _variance(left_out: Float[Array, " units"]) -> float:
    """Of the jackknife."""
    units = len(left_out)
    return float((units - 1) / units * np.square(left_out - left_out.mean()).sum())


def _of_pairs(values: Float[Array, " pairs"], experts: int) -> Float[Array, "experts experts"]:
    """As a symmetric matrix."""
    matrix = np.zeros((experts, experts))
    matrix[np.triu_indices(experts, 1)] = values
    return matrix + matrix.T


def _spearman(
    one: Float[Array, " pairs"], other: Float[Array, "estimates pairs"]
) -> Float[Array, " estimates"]:
    """NaN where one of them does not vary."""
    left, right = rankdata(one), rankdata(other, axis=1)
    left, right = left - left.mean(), right - right.mean(1, keepdims=True)
    squares = (left @ left) * np.square(right).sum(1)
    return np.where(squares > 0, right @ left / np.sqrt(np.where(squares > 0, squares, 1)), np.nan)
