"""From squared errors per document to FVU, score and their intervals.

    FVU   = squared error / squared distance of the outputs from their training mean
    null  = min(mean FVU of the random targets of either kind, FVU of the linear map, 1)
    score = (null - FVU) / (null - ceiling)

The ceiling is the FVU that the same solver reaches on the source expert itself behind a hidden
rotation of its inputs. A score of zero or less is no evidence of shared function.

The two kinds stay apart: averaged with targets that share nothing, random targets that share the
output space would let a pair score for its output space alone.

The interval answers whether the pair is better than a random expert could be, not whether it is
better than their mean: a random expert in the pair's place has half a chance of the latter. So it
holds the spread of one more random target (a prediction interval), not that of their mean.
"""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from moescope.measures.bootstrap import (
    FEWEST_UNITS,
    expanded_level,
    ratio_interval,
    resampled_counts,
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
    """Over documents and over what one more random target would have reached."""
    high: float = math.nan
    """The same."""


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
    sums, kinds = errors.columns(), len(errors.random)
    point = _Shares.of(sums.sum(0, keepdims=True), kinds)
    means = point.random.mean(2)
    if point.null(means)[0] - point.ceiling[0] < NARROW:
        return Score()
    value = float(point.score(means)[0])
    if len(sums) < FEWEST_UNITS:
        return Score(value=value)
    generator = np.random.default_rng(seed)
    counts = resampled_counts(len(sums), _DRAWS, generator)
    draws = _Shares.of(counts @ sums, kinds)
    spread = _spread_of_levels(point.random[0], draws.random)
    scores = draws.score(_one_more(draws.random, spread, generator))
    # Plain percentiles: what the predictions have below the estimated null is no bias to be undone.
    tail = (1 - expanded_level(len(sums))) / 2
    low, high = np.nanquantile(scores, [tail, 1 - tail]).tolist()
    return Score(value=value, low=low, high=high)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Shares:
    """FVU of everything, per draw."""

    pair: Float[np.ndarray, " draws"]
    linear: Float[np.ndarray, " draws"]
    ceiling: Float[np.ndarray, " draws"]
    random: Float[np.ndarray, "draws kinds seeds"]

    @classmethod
    def of(cls, totals: Float[np.ndarray, "draws columns"], kinds: int) -> "_Shares":
        """From column totals, in the order of `Errors.columns`."""
        shares = totals[:, 1:] / totals[:, :1]
        return cls(
            pair=shares[:, 0],
            linear=shares[:, 1],
            ceiling=shares[:, 2],
            random=shares[:, 3:].reshape(len(shares), kinds, -1),
        )

    def null(self, random: Float[np.ndarray, "draws kinds"]) -> Float[np.ndarray, " draws"]:
        """The best that needs no likeness, with `random` for the random targets of each kind."""
        null: np.ndarray = np.minimum(np.minimum(random.min(1), self.linear), 1.0)
        return null

    def score(self, random: Float[np.ndarray, "draws kinds"]) -> Float[np.ndarray, " draws"]:
        """In units of the distance from the mean null to the ceiling.

        A null drawn near or below the ceiling must neither blow the unit up nor turn its sign.
        """
        unit = np.maximum(self.null(self.random.mean(2)) - self.ceiling, NARROW)
        score: np.ndarray = (self.null(random) - self.pair) / unit
        return score


def _spread_of_levels(
    random: Float[np.ndarray, "kinds seeds"], draws: Float[np.ndarray, "draws kinds seeds"]
) -> Float[np.ndarray, " kinds"]:
    """Standard deviation of the random targets of each kind, without what documents add to it.

    Each one's FVU differs from the others' also by the chance of these documents. The resampled
    documents bring that chance along, for the pair as for the null; it would be counted twice.
    """
    seeds = random.shape[1]
    apart = draws - draws.mean(2, keepdims=True)
    chance = apart.var(axis=0).sum(1) / (seeds - 1)
    spread: np.ndarray = np.sqrt(np.maximum(random.var(axis=1, ddof=1) - chance, 0))
    return spread


def _one_more(
    random: Float[np.ndarray, "draws kinds seeds"],
    spread: Float[np.ndarray, " kinds"],
    generator: np.random.Generator,
) -> Float[np.ndarray, "draws kinds"]:
    """What one more random target of each kind could have reached.

    mean + sd * sqrt(1 + 1 / n) * t, with t of n - 1 degrees of freedom: the predictive law of a
    normal sample. Drawing one of the n themselves would never go beyond the best of them, which
    an equal pair passes with probability 1 / (n + 1), far above the 2.5% of the interval.
    """
    draws, kinds, seeds = random.shape
    deviation = generator.standard_t(seeds - 1, size=(draws, kinds))
    predicted: np.ndarray = random.mean(2) + spread * math.sqrt(1 + 1 / seeds) * deviation
    return predicted
