"""Intervals over documents for statistics of sums, by the BCa bootstrap.

A ratio such as an FVU is a function of column totals. Resampling documents with replacement
resamples these totals, so one matrix product gives all draws at once.
"""

import math

import numpy as np
from jaxtyping import Float
from scipy.special import ndtr, ndtri, stdtrit

FEWEST_UNITS = 30
"""Documents below which no interval is given: with fewer it covers too little."""


def resampled_totals(
    sums: Float[np.ndarray, "units columns"], draws: int, generator: np.random.Generator
) -> Float[np.ndarray, "draws columns"]:
    """Column totals of `draws` samples of the units, with replacement."""
    units = len(sums)
    counts = generator.multinomial(units, np.full(units, 1 / units), size=draws)
    totals: np.ndarray = counts @ sums
    return totals


def leave_one_out_totals(
    sums: Float[np.ndarray, "units columns"],
) -> Float[np.ndarray, "units columns"]:
    """Column totals without each unit in turn."""
    totals: np.ndarray = sums.sum(0) - sums
    return totals


def expanded_quantile(level: float, units: int) -> float:
    """Normal quantile at which a percentile interval of `units` covers `level`."""
    return float(stdtrit(units - 1, (1 + level) / 2) * math.sqrt(units / (units - 1)))


def bca_interval(
    estimate: float,
    replicates: Float[np.ndarray, " draws"],
    jackknife: Float[np.ndarray, " units"],
    level: float = 0.95,
) -> tuple[float, float]:
    """Bias-corrected and accelerated interval (Efron 1987; DiCiccio and Efron 1996, eq. 2.3).

    The nominal level is expanded from normal to t quantiles, times sqrt(n / (n - 1)), as the
    bootstrap knows nothing of the narrowness of small samples (Hesterberg 2015, section 4.3).

    Args:
        estimate: The statistic on the sample itself.
        replicates: The statistic on resampled samples; those that are not finite are left out.
        jackknife: The statistic without each unit.
        level: Wanted coverage.

    Returns:
        The limits; NaN where fewer than half of the replicates are finite.
    """
    finite = replicates[np.isfinite(replicates)]
    if 2 * len(finite) < len(replicates) or not math.isfinite(estimate):
        return math.nan, math.nan
    below = ((finite < estimate).sum() + 0.5 * (finite == estimate).sum()) / len(finite)
    bias = ndtri(np.clip(below, 0.5 / len(finite), 1 - 0.5 / len(finite)))
    distance = jackknife.mean() - jackknife
    spread = (distance**2).sum()
    acceleration = (distance**3).sum() / (6 * spread**1.5) if spread > 0 else 0.0
    normal = bias + expanded_quantile(level, len(jackknife)) * np.array([-1.0, 1.0])
    low, high = np.quantile(finite, ndtr(bias + normal / (1 - acceleration * normal)))
    return float(low), float(high)


def ratio_interval(
    numerators: Float[np.ndarray, "units columns"],
    denominators: Float[np.ndarray, " units"],
    *,
    resamples: int,
    seed: int,
) -> tuple[Float[np.ndarray, " columns"], Float[np.ndarray, " columns"]]:
    """95% BCa limits of each column's total over the total of the denominators.

    NaN where there are fewer than `FEWEST_UNITS` units: below it the interval covers too little.
    """
    columns = numerators.shape[1]
    if len(denominators) < FEWEST_UNITS:
        return np.full(columns, np.nan), np.full(columns, np.nan)
    sums = np.column_stack([numerators, denominators])
    point = sums.sum(0, keepdims=True)
    draws = resampled_totals(sums, resamples, np.random.default_rng(seed))
    ratios = [
        totals[:, :-1] / totals[:, -1:] for totals in (point, draws, leave_one_out_totals(sums))
    ]
    limits = [
        bca_interval(float(p[0]), d, j) for p, d, j in zip(*(r.T for r in ratios), strict=True)
    ]
    low, high = np.array(limits).T
    return low, high
