"""From squared errors per document to FVU, score and their intervals.

    FVU   = squared error / squared distance of the outputs from their training mean
    null  = min(mean FVU of the random targets, FVU of the linear map, 1)
    score = (null - FVU) / (null - ceiling)

The ceiling is the FVU that the same solver reaches on the source expert itself behind a hidden
rotation of its inputs. A score of zero or less is no evidence of shared function.
"""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from moescope.measures.bootstrap import (
    FEWEST_UNITS,
    bca_interval,
    leave_one_out_totals,
    ratio_interval,
    resampled_totals,
)

_DRAWS = 2_000
NARROW = 0.05
"""Distance of null and ceiling below which a score means nothing."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Errors:
    """Sums over the tokens of each held-out document."""

    total: Float[np.ndarray, " documents"]
    """Squared distance of the outputs from their training mean."""
    pair: Float[np.ndarray, " documents"]
    """Squared error of the pair's adapter."""
    linear: Float[np.ndarray, " documents"]
    """Squared error of the linear map."""
    ceiling: Float[np.ndarray, " documents"]
    """Squared error of the hidden-rotation self."""
    random: Float[np.ndarray, "kinds seeds documents"]
    """Squared errors of the random targets."""

    def columns(self) -> Float[np.ndarray, "documents columns"]:
        """Total, pair, linear, ceiling, then the random targets."""
        random = self.random.reshape(-1, self.random.shape[-1])
        return np.stack([self.total, self.pair, self.linear, self.ceiling, *random], axis=1)


@dataclass(frozen=True, kw_only=True)
class Score:
    """The score and its 95% interval; NaN where they cannot be had."""

    value: float = math.nan
    """Zero: as good as the null; one: as good as the ceiling."""
    low: float = math.nan
    """Over documents and random seeds."""
    high: float = math.nan
    """Over documents and random seeds."""


def fvu_interval(
    errors: Float[np.ndarray, " documents"],
    total: Float[np.ndarray, " documents"],
    seed: int,
) -> tuple[float, float]:
    """95% interval of a summed error over the summed variance; NaN under 30 documents."""
    low, high = ratio_interval(errors[:, None], total, resamples=_DRAWS, seed=seed)
    return float(low[0]), float(high[0])


@np.errstate(divide="ignore", invalid="ignore")  # draws that are not finite are left out
def score_of(errors: Errors, seed: int) -> Score:
    """The score on the held-out documents; NaN where null and ceiling are too near each other."""
    sums = errors.columns()
    point = sums.sum(0, keepdims=True)
    null, ceiling = _null_and_ceiling(point)
    if null[0] - ceiling[0] < NARROW:
        return Score()
    value = float(_score(point)[0])
    if len(sums) < FEWEST_UNITS:
        return Score(value=value)
    generator = np.random.default_rng(seed)
    draws = resampled_totals(sums, _DRAWS, generator)
    draws[:, 4:] = _redraw_seeds(draws[:, 4:], len(errors.random), generator)
    low, high = bca_interval(value, _score(draws), _score(leave_one_out_totals(sums)))
    return Score(value=value, low=low, high=high)


def _redraw_seeds(
    random: Float[np.ndarray, "draws targets"], kinds: int, generator: np.random.Generator
) -> Float[np.ndarray, "draws targets"]:
    """Resample the random targets too, within each kind: the null has a spread of its own."""
    draws, targets = random.shape
    seeds = targets // kinds
    chosen = generator.integers(seeds, size=(draws, kinds, seeds))
    chosen = chosen + seeds * np.arange(kinds)[:, None]
    return np.take_along_axis(random, chosen.reshape(draws, targets), axis=1)


def _null_and_ceiling(
    totals: Float[np.ndarray, "draws columns"],
) -> tuple[Float[np.ndarray, " draws"], Float[np.ndarray, " draws"]]:
    shares = totals / totals[:, :1]
    random = shares[:, 4:].mean(1)
    return np.minimum(np.minimum(random, shares[:, 2]), 1.0), shares[:, 3]


def _score(totals: Float[np.ndarray, "draws columns"]) -> Float[np.ndarray, " draws"]:
    null, ceiling = _null_and_ceiling(totals)
    score: np.ndarray = (null - totals[:, 1] / totals[:, 0]) / (null - ceiling)
    return score
