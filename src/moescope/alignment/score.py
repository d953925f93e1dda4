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

from moescope.alignment.options import MINIMUM_DOCUMENTS
from moescope.measures.bootstrap import bca_interval, leave_one_out_totals, resampled_totals

_DRAWS = 2_000
_NARROW = 0.05
"""Distance of null and ceiling below which a score means nothing."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Errors:
    """Sums over the tokens of each held-out document."""

    total: Float[np.ndarray, " documents"]
    """Squared distance of the outputs from their training mean."""
    pair: Float[np.ndarray, " documents"]
    """Squared error of the pair's adapter."""
    linear: Float[np.ndarray, " documents"] | None
    """Squared error of the linear map."""
    ceiling: Float[np.ndarray, " documents"] | None
    """Squared error of the hidden-rotation self; None where the source is not known."""
    random: Float[np.ndarray, "kinds seeds documents"] | None
    """Squared errors of the random targets."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """Score and intervals; NaN where they cannot be had."""

    fvu_low: float = math.nan
    """Lower end of the 95% interval of the FVU."""
    fvu_high: float = math.nan
    """Upper end."""
    score: float = math.nan
    """Zero: as good as the null; one: as good as the ceiling."""
    score_low: float = math.nan
    """Lower end of the 95% interval, over documents and random seeds."""
    score_high: float = math.nan
    """Upper end."""
    undefined: bool = False
    """Null and ceiling are too near each other."""


def score_of(errors: Errors, generator: np.random.Generator) -> Score:
    """Score a pair on the held-out documents; intervals from 30 documents on."""
    columns = [errors.total, errors.pair]
    scored = errors.random is not None and errors.ceiling is not None
    if errors.random is not None and errors.ceiling is not None and errors.linear is not None:
        kinds, seeds, _ = errors.random.shape
        columns += [errors.linear, errors.ceiling, *errors.random.reshape(kinds * seeds, -1)]
    sums = np.stack(columns, axis=1)  # [documents, columns]
    point = sums.sum(0, keepdims=True)
    fvu = float(_fvu(point)[0])
    enough = len(sums) >= MINIMUM_DOCUMENTS
    draws = resampled_totals(sums, _DRAWS, generator) if enough else point
    left_out = leave_one_out_totals(sums)
    limits = (math.nan, math.nan)
    if enough:
        limits = bca_interval(fvu, _fvu(draws), _fvu(left_out))
    if not scored:
        return Score(fvu_low=limits[0], fvu_high=limits[1])
    if _null(point)[0] - _ceiling(point)[0] < _NARROW:
        return Score(fvu_low=limits[0], fvu_high=limits[1], undefined=True)
    score = float(_score(point)[0])
    score_limits = (math.nan, math.nan)
    if enough:
        drawn = np.concatenate([draws[:, :4], _redraw_seeds(draws[:, 4:], kinds, generator)], 1)
        score_limits = bca_interval(score, _score(drawn), _score(left_out))
    return Score(
        fvu_low=limits[0],
        fvu_high=limits[1],
        score=score,
        score_low=score_limits[0],
        score_high=score_limits[1],
    )


def _redraw_seeds(
    random: Float[np.ndarray, "draws targets"], kinds: int, generator: np.random.Generator
) -> Float[np.ndarray, "draws targets"]:
    """Resample the random targets too, within each kind: the null has a spread of its own."""
    draws, targets = random.shape
    seeds = targets // kinds
    chosen = generator.integers(seeds, size=(draws, kinds, seeds))
    chosen = chosen + seeds * np.arange(kinds)[:, None]
    return np.take_along_axis(random, chosen.reshape(draws, targets), axis=1)


def _fvu(totals: Float[np.ndarray, "draws columns"]) -> Float[np.ndarray, " draws"]:
    with np.errstate(divide="ignore", invalid="ignore"):
        return totals[:, 1] / totals[:, 0]


def _null(totals: Float[np.ndarray, "draws columns"]) -> Float[np.ndarray, " draws"]:
    with np.errstate(divide="ignore", invalid="ignore"):
        linear = totals[:, 2] / totals[:, 0]
        random = totals[:, 4:].mean(1) / totals[:, 0]
    return np.minimum(np.minimum(linear, random), 1.0)


def _ceiling(totals: Float[np.ndarray, "draws columns"]) -> Float[np.ndarray, " draws"]:
    with np.errstate(divide="ignore", invalid="ignore"):
        return totals[:, 3] / totals[:, 0]


def _score(totals: Float[np.ndarray, "draws columns"]) -> Float[np.ndarray, " draws"]:
    null = _null(totals)
    with np.errstate(divide="ignore", invalid="ignore"):
        return (null - _fvu(totals)) / (null - _ceiling(totals))
