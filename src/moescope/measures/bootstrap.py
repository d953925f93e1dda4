"""Intervals over documents for ratios of sums, by the studentised bootstrap.

A ratio such as an FVU and its standard error are functions of column totals. Resampling documents
with replacement resamples these totals, so a few matrix products give all draws at once.
"""

import math

import numpy as np
from jaxtyping import Float
from scipy.special import ndtr, stdtrit

FEWEST_UNITS = 30
"""Documents below which no interval is given: with fewer it covers too little."""
ROUNDING = 1e-9
"""Share of a sum of squares below which what subtraction leaves of it is rounding, not spread."""
_LEVEL = 0.95


def resampled_counts(
    units: int, draws: int, generator: np.random.Generator
) -> Float[np.ndarray, "draws units"]:
    """How often each unit comes in each of `draws` samples of the units, with replacement."""
    return generator.multinomial(units, np.full(units, 1 / units), size=draws).astype(float)


def ratio_interval(
    numerators: Float[np.ndarray, "units columns"],
    denominators: Float[np.ndarray, " units"],
    *,
    resamples: int,
    seed: int,
) -> tuple[Float[np.ndarray, " columns"], Float[np.ndarray, " columns"]]:
    """95% limits of each column's total over the total of the denominators; none is negative.

    The symmetric studentised interval on the log scale (Hall 1988, sections 3 and 4): the estimate
    times or divided by `exp(q * error)`, with the linearised standard error of the log ratio and
    q the 95% quantile of `|log ratio* - log ratio| / error*` over resampled units. Long documents
    and heavy tails widen q itself, which percentile intervals, BCa among them, cannot do.

    NaN where there are fewer than `FEWEST_UNITS` units: below it the interval covers too little.
    A ratio of zero has limits of zero.
    """
    units, columns = numerators.shape
    if units < FEWEST_UNITS:
        return np.full(columns, np.nan), np.full(columns, np.nan)
    ratio = numerators.sum(0) / denominators.sum()
    residuals = numerators - ratio * denominators[:, None]
    _, error = _moved(np.ones((1, units)), ratio, residuals, denominators)
    counts = resampled_counts(units, resamples, np.random.default_rng(seed))
    moved, errors = _moved(counts, ratio, residuals, denominators)
    reach = np.empty(columns)
    for i in range(columns):
        # A draw with a ratio of zero has no log. One without any spread is the estimate itself.
        usable = np.isfinite(moved[:, i]) & (errors[:, i] > 0)
        distances = np.abs(moved[usable, i]) / errors[usable, i]
        reach[i] = np.quantile(distances, _LEVEL) * error[0, i] if usable.any() else 0.0
    return ratio * np.exp(-reach), ratio * np.exp(reach)


@np.errstate(divide="ignore", invalid="ignore")  # a ratio of zero
def _moved(
    counts: Float[np.ndarray, "draws units"],
    ratio: Float[np.ndarray, " columns"],
    residuals: Float[np.ndarray, "units columns"],
    denominators: Float[np.ndarray, " units"],
) -> tuple[Float[np.ndarray, "draws columns"], Float[np.ndarray, "draws columns"]]:
    """How far each draw's log ratio lies from the log of `ratio`, and its standard error."""
    total = (counts @ denominators)[:, None]
    step = counts @ residuals / total  # from `ratio` to the draw's own
    spread = counts @ residuals**2
    squares = (
        spread
        - 2 * step * (counts @ (residuals * denominators[:, None]))
        + step**2 * (counts @ denominators**2)[:, None]
    )
    squares[squares <= ROUNDING * spread] = 0
    own = (ratio + step) * total
    return np.log1p(step / ratio), np.sqrt(squares) / own


def expanded_level(units: int) -> float:
    """Level at which percentiles over resamples of `units` cover 95% (Hesterberg 2015, 4.3).

    From normal to t quantiles, times sqrt(n / (n - 1)): the bootstrap knows nothing of the
    narrowness of small samples.
    """
    quantile = stdtrit(units - 1, (1 + _LEVEL) / 2) * math.sqrt(units / (units - 1))
    return float(2 * ndtr(quantile) - 1)
