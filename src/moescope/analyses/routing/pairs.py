"""Tables of pairs of experts: those of one token in a layer, and in a layer and the next."""

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int
from numpy import ndarray as Array

from moescope.analyses.routing.counts import LayerCounts
from moescope.measures.coactivation import independent, quasi_independent, ratio
from moescope.measures.jackknife import log_limits, whole_and_left_out

MOST_PARTNERS = 64
"""Rows of one expert in a table of pairs: the partners of the largest difference from chance."""


def coactivation_table(counts: LayerCounts) -> pd.DataFrame:
    """Experts that share a token with each expert, beside quasi-independence.

    Empty where a token has one expert.
    """
    if counts.top_k == 1:
        return pd.DataFrame()
    together = whole_and_left_out(counts.together)
    pairs = _pairs(together, quasi_independent(together))
    return _table(counts, "other", pairs, excluded=np.eye(counts.num_experts, dtype=bool))


def transition_table(counts: LayerCounts, tokens: Int[Array, " groups"]) -> pd.DataFrame:
    """Experts of the next layer that the tokens of each expert go to, beside independence.

    Empty for the last layer.

    Args:
        counts: Those of the layer.
        tokens: Tokens of every group of documents.
    """
    if counts.onward is None:
        return pd.DataFrame()
    parts = (counts.onward.together, counts.by_group(), counts.onward.used, tokens)
    together, here, there, total = (whole_and_left_out(part, tokens > 0) for part in parts)
    pairs = _pairs(together, independent(here, there, total))
    nothing = np.zeros(together.shape[1:], dtype=bool)
    table = _table(counts, "next_expert", pairs, excluded=nothing)
    table.insert(2, "next_layer", counts.onward.layer)
    return table


def _pairs(
    together: Int[Array, "estimates experts others"],
    expected: Float[Array, "estimates experts others"],
) -> dict[str, Array]:
    """Columns of a table of pairs, [experts, others] each, with 95% limits of the lift.

    The first estimate is that of all groups of documents, the others leave one out.
    """
    lift = ratio(together, expected)
    low, high = log_limits(lift)
    found = {"tokens": together[0], "expected": expected[0]}
    return found | {"lift": lift[0], "low": low, "high": high}


def _table(
    counts: LayerCounts,
    other: str,
    pairs: dict[str, Array],
    excluded: Bool[Array, "experts others"],
) -> pd.DataFrame:
    """One row per pair, for each expert those of the largest difference from chance."""
    difference = np.abs(pairs["tokens"] - pairs["expected"])
    ranked = np.argsort(np.where(excluded, np.inf, -difference), axis=1, kind="stable")
    named = np.zeros(excluded.shape, dtype=bool)
    np.put_along_axis(named, ranked[:, :MOST_PARTNERS], values=True, axis=1)
    experts, others = np.nonzero(named & ~excluded)
    chosen = {name: values[experts, others] for name, values in pairs.items()}
    tokens = counts.by_expert()[experts]
    frame = {
        **counts.names,
        "expert": experts,
        other: others,
        "tokens": chosen["tokens"],
        "share": chosen["tokens"] / np.maximum(tokens, 1),
        "expected": chosen["expected"] / np.maximum(tokens, 1),
        "lift": chosen["lift"],
        "low": chosen["low"],
        "high": chosen["high"],
        "n_tokens": tokens,
    }
    return pd.DataFrame(frame)
