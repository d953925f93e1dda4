"""How far a random expert gets by chance: measured on the random experts of all pairs.

A pair has five random experts of a kind, too few to tell how their errors are spread: where these
are skewed, or some lie far out, any rule for five is wrong. All pairs together have many. So each
random expert is held against the others of its own pair, as the pair is held against all of them:
the logarithm of their mean FVU over its own. What they reach is what pairs reach by chance. Some
pairs may spread more than others: the expected number of pairs beyond a limit, which Bonferroni's
sum is about, is that of random experts all the same.

Beyond the largest of them chance is taken to fall as the fourth power, as the tail of the t
distribution that one more of five random experts is predicted with. An FVU whose small values are
as rare as any power of them falls faster: as an exponential of its logarithm.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from numpy import ndarray as Array

PAIR = ["source_layer", "source_expert", "target_layer", "target_expert"]
COLUMNS = [*PAIR, "kind", "number", "fvu"]
_POWER = 4


def random_rows(pair: Sequence[int], random: Mapping[str, Sequence[float]]) -> list[dict[str, Any]]:
    """A row per random expert of a pair, from their FVU by kind."""
    named = dict(zip(PAIR, pair, strict=True))
    return [
        named | {"kind": kind, "number": number, "fvu": fvu}
        for kind, found in random.items()
        for number, fvu in enumerate(found)
    ]


def chance_p_values(pairs: pd.DataFrame, random: pd.DataFrame) -> Float[Array, " pairs"]:
    """One-sided p-value of an FVU like that of one more random expert; NaN without random experts.

    Of the kinds of random experts the one that does better counts: the larger p-value.

    Args:
        pairs: A row per pair, with its `fvu`.
        random: A row per random expert, with the columns `COLUMNS`.
    """
    found = []
    for _, kind in random.groupby("kind"):
        of_pairs = kind.groupby(PAIR)["fvu"]
        # Pairs of one source share random experts: these count once.
        own = np.unique(np.array(of_pairs.agg(list).tolist()), axis=0)
        mean = of_pairs.mean().rename("mean")
        means = pairs[PAIR].join(mean, on=PAIR)["mean"].to_numpy(float)
        found.append(tail_p_values(np.log(means / pairs["fvu"].to_numpy(float)), _advantages(own)))
    nothing = np.full(len(pairs), np.nan)
    return np.max(found, axis=0) if found else nothing


def _advantages(fvu: Float[Array, "groups random"]) -> Float[Array, " all"]:
    """Of every random expert over the others of its group; a little wider than over one more."""
    others = (fvu.sum(axis=1, keepdims=True) - fvu) / (fvu.shape[1] - 1)
    return np.ravel(np.log(others / fvu))


def tail_p_values(
    values: Float[Array, " pairs"], chance: Float[Array, " draws"]
) -> Float[Array, " pairs"]:
    """How often chance gives as much; beyond its values by the fourth power of the worst of them.

    For every value `q` of chance, of which `k` are as large, `(k + 1) / (n + 1) min(1, q / x)^4`
    bounds the p-value of x: the largest of these is taken.
    """
    ascending = np.sort(chance[chance > 0])
    rank = np.arange(len(ascending) + 1, 1, -1.0)  # of each, from the largest, and one
    beyond = np.append(0.0, np.maximum.accumulate(rank * ascending**_POWER))
    place = np.searchsorted(ascending, values)
    with np.errstate(divide="ignore", invalid="ignore"):
        p_values = np.maximum(np.append(rank, 0.0)[place], beyond[place] / values**_POWER)
    p_values = np.where(values > 0, p_values / (len(chance) + 1), 1.0)
    return np.where(np.isnan(values), np.nan, np.minimum(p_values, 1.0))
