"""The tables of an atlas: pairs of experts with p-values, and pairs of layers."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from numpy import ndarray as Array
from scipy.stats import t as student

from moescope.alignment.options import RANDOM_SEEDS
from moescope.analyses.atlas.chance import PAIR, chance_p_values
from moescope.measures.multiple_tests import holm

LEVEL = 0.05
LAYERS = ["source_layer", "target_layer"]


def score_p_values(
    score: Float[Array, " pairs"], low: Float[Array, " pairs"]
) -> Float[Array, " pairs"]:
    """One-sided p-value of a score of zero or less, from the lower end of its 95% interval.

    The interval holds the spread of one more random expert, predicted from `RANDOM_SEEDS` of them:
    its tail is that of a t distribution with one degree of freedom less. Where the spread over
    documents is the larger part the tail is thinner than that, and the p-value too large.
    """
    degrees = RANDOM_SEEDS - 1
    reach = np.where(score > low, score - low, np.nan)
    p_values: Float[Array, " pairs"] = student.sf(
        score / reach * student.ppf(0.975, degrees), degrees
    )
    return p_values


def with_p_values(pairs: pd.DataFrame, random: pd.DataFrame) -> pd.DataFrame:
    """The pairs with `p_value` and `p_holm`, corrected for all pairs that were looked at.

    The p-value is the larger of two: of the score, in which documents and the linear map count, and
    of what random experts reach by chance. The first alone is too small where errors of random
    experts are skewed to the low side, for it knows their spread from few of them.

    A pair without a score was looked at too: screening chose among all of them, and the best of
    many random experts is better than one more.
    """
    score, low = (pairs[name].to_numpy(float) for name in ("score", "score_low"))
    p_values = np.maximum(score_p_values(score, low), chance_p_values(pairs, random))
    corrected = holm(np.nan_to_num(p_values, nan=1.0))
    return pairs.assign(
        p_value=p_values,
        p_holm=np.where(np.isnan(p_values), np.nan, corrected),
        claimed=(corrected < LEVEL) & ~np.isnan(p_values),
    )


def by_layers(pairs: pd.DataFrame) -> pd.DataFrame:
    """A row per ordered pair of layers; numbers of the pairs that screening kept."""
    groups = pairs.groupby(LAYERS, sort=True)
    return pd.DataFrame([_summary(frame) for _, frame in groups])


def _summary(frame: pd.DataFrame) -> dict[str, Any]:
    kept = frame[frame["stage"] == "converged"]
    measured, tested = kept[kept["fvu"].notna()], kept[kept["score_low"].notna()]
    above = int((tested["score_low"] > 0).sum())
    best = _best(kept)
    medians = ("score", "fvu", "fvu_linear", "fvu_random", "fvu_self", "overlap")
    return {
        **{name: int(frame[name].iloc[0]) for name in LAYERS},
        "pairs": len(frame),
        "n": len(measured),
        "tested": len(tested),
        "best_score": best.get("score", math.nan),
        "best_low": best.get("score_low", math.nan),
        "best_high": best.get("score_high", math.nan),
        "best_source": best.get("source_expert", -1),
        "best_target": best.get("target_expert", -1),
        **{f"median_{name}": float(measured[name].median()) for name in medians},
        "least_fvu": float(measured["fvu"].min()),
        "short_fvu": float(frame["short_fvu"].median()),
        "above_zero": above,
        "share_above": above / len(tested) if len(tested) else math.nan,
        "claimed": int(kept["claimed"].sum()),
    }


def _best(kept: pd.DataFrame) -> Mapping[Any, Any]:
    """The pair of the highest score, if any has one."""
    scored = kept[kept["score"].notna()]
    return {} if scored.empty else scored.iloc[int(scored["score"].argmax())].to_dict()


def joined(screened: pd.DataFrame, rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Screened pairs with the columns of their converged fits, where they have one."""
    fitted = pd.DataFrame(rows)
    if fitted.empty:
        return screened
    return screened.merge(fitted, on=PAIR, how="left", validate="one_to_one")
