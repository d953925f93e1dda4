"""Losses held against others on the same tokens, and against random draws as chance."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy.optimize import brentq
from scipy.special import stdtrit

from moescope.evaluate.totals import Resampling, counts, difference_columns, difference_reach
from moescope.measures.bootstrap import FEWEST_UNITS
from moescope.measures.decisions import zero_mean_p_value

_OUTSIDE = 0.05
_LEAST_LOG = -500.0
"""Natural logarithm of the smallest p-value above 0."""


def loss_difference(
    own: pd.DataFrame, others: Sequence[pd.DataFrame], resampling: Resampling, *, random: bool
) -> dict[str, Any]:
    """By how much a loss lies above the mean of others, by document.

    Args:
        own: tokens, and loss, its sum, by document.
        others: The same of what it is held against.
        resampling: Of the intervals.
        random: Whether the others are draws of chance: see `one_more_draw`.

    Returns:
        difference per token, with its 95% limits; least and most of it over the others, and draws,
        how many; p_value, two-sided, of no difference; `counts`.
    """
    each = np.array([(own["loss"] - other["loss"]).sum() for other in others])
    each = each / own["tokens"].sum()
    loss = np.mean([other["loss"].to_numpy() for other in others], axis=0)
    frame = own.assign(difference=own["loss"] - loss)
    about = {"least": each.min(), "most": each.max(), "draws": len(each)}
    about |= counts(frame, resampling)
    if random:
        found = one_more_draw(each, frame, resampling)
        limits = {"difference_low": found.low, "difference_high": found.high}
        return {"difference": each.mean(), **limits, **about, "p_value": found.p_value}
    enough = len(own) >= FEWEST_UNITS
    p_value = zero_mean_p_value(frame["difference"].to_numpy()) if enough else np.nan
    return {**difference_columns(frame, "difference", resampling), **about, "p_value": p_value}


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Of a difference from one more draw; NaN under 30 documents or two draws."""

    low: float
    """Lower 95% limit."""
    high: float
    """Upper 95% limit."""
    p_value: float
    """Two-sided, of what is compared being such a draw itself."""


def one_more_draw(
    each: Float[np.ndarray, " draws"], documents: pd.DataFrame, resampling: Resampling
) -> Prediction:
    """A difference from the mean of n draws, seen as one from another draw.

    Documents say how well these draws are known, not how others would do: the best of n + 1 equal
    ones is best on ever so many documents. So half the width of the interval is the hypotenuse of
    that over documents and of t * sd * sqrt(1 + 1/n), t with n - 1 degrees of freedom; where one of
    the two is nothing it is exact, and between wider than need be.

    Args:
        each: Difference from each draw, per token.
        documents: tokens, and difference from the mean of the draws, by document.
        resampling: Of the documents.
    """
    sums, tokens = documents["difference"].to_numpy(), documents["tokens"].to_numpy(dtype=float)
    over_documents = difference_reach(sums, tokens, resampling)
    mean, draws = float(each.mean()), len(each)
    if np.isnan(over_documents) or draws < 2:
        return Prediction(low=np.nan, high=np.nan, p_value=np.nan)
    freedom = np.array([len(sums) - 1, draws - 1])
    errors = np.array(
        [
            -over_documents / stdtrit(freedom[0], _OUTSIDE / 2),
            each.std(ddof=1) * np.sqrt(1 + 1 / draws),
        ]
    )

    def reach(log_p: float) -> float:
        return float(np.hypot(*(stdtrit(freedom, np.exp(log_p) / 2) * errors)))

    half = reach(np.log(_OUTSIDE))
    p_value = 0.0
    if reach(_LEAST_LOG) > abs(mean):
        p_value = float(np.exp(brentq(lambda log_p: reach(log_p) - abs(mean), _LEAST_LOG, 0)))
    return Prediction(low=mean - half, high=mean + half, p_value=p_value if errors.any() else 1.0)
