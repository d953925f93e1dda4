"""What screening misses: measured where every pair was fitted, else estimated from a sample."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import norm, spearmanr
from scipy.stats import t as student

SOURCE = ["source_layer", "source_expert"]
COLUMNS = ["measure", "kept", "value", "low", "high", "chance", "n_sources", "n_pairs"]


def recall(pairs: pd.DataFrame) -> pd.DataFrame:
    """One row per measure, with its 95% interval over imitated experts.

    Where every pair has a converged fit: `best kept`, how often the target of least held-out FVU of
    a layer is among the first `kept` by screening; and `rank correlation`, of the places that
    screening gives with the FVU, within a layer. Else `rejected better`: how often a random
    rejected pair has a smaller FVU than the worst that was kept, of the same imitated expert and
    target layer; and `recall, estimated`: the part that was kept of the pairs that are at least as
    good as that one.
    """
    known = pairs[pairs["fvu"].notna()]
    everything = bool((pairs["stage"] == "converged").all())
    rows = _measured(known) if everything else _estimated(pairs, known)
    return pd.DataFrame(rows, columns=COLUMNS)


def _measured(known: pd.DataFrame) -> list[dict[str, Any]]:
    """From all pairs; a source's value is the mean over its target layers."""
    found = []
    for (*source, _), layer in known.groupby([*SOURCE, "target_layer"]):
        if len(layer) > 1:
            place = layer["place"].rank().to_numpy()
            rank = float(spearmanr(place, layer["fvu"]).statistic)
            found.append((*source, len(layer), place[int(layer["fvu"].argmin())], rank))
    frame = pd.DataFrame(found, columns=[*SOURCE, "size", "place", "rank"])
    if frame.empty:
        return []
    rows = []
    for kept in range(1, int(frame["size"].max())):
        hits = (frame["place"] <= kept).astype(float).groupby([frame[c] for c in SOURCE]).mean()
        chance = float((kept / frame["size"]).clip(upper=1).mean())
        rows.append(_row("best kept", kept, hits.tolist(), chance, len(known)))
    ranks = frame.groupby(SOURCE)["rank"].mean().dropna().tolist()
    return [*rows, _row("rank correlation", 0, ranks, 0.0, len(known))]


def _estimated(pairs: pd.DataFrame, known: pd.DataFrame) -> list[dict[str, Any]]:
    """From a random sample of the rejected."""
    kept = known[known["stage"] == "converged"]
    worst = kept.groupby([*SOURCE, "target_layer"])["fvu"].max().rename("worst")
    drawn = known[known["sampled"]].join(worst, on=[*SOURCE, "target_layer"])
    drawn = drawn[drawn["worst"].notna()]
    if drawn.empty:
        return []
    better = (drawn["fvu"] < drawn["worst"]).astype(float)
    by_source = better.groupby([drawn[column] for column in SOURCE]).mean()
    judged = pairs.set_index(SOURCE).loc[by_source.index].reset_index()
    survived = judged["stage"] == "converged"
    layers = survived.groupby([judged[column] for column in [*SOURCE, "target_layer"]])
    survivors, left = float(layers.sum().mean()), float((layers.size() - layers.sum()).mean())
    # As many are drawn for every expert: each stands for as many as were rejected for its own.
    rejected = (~survived).astype(float)
    weights = rejected.groupby([judged[column] for column in SOURCE]).sum().tolist()

    def share_kept(missed: float) -> float:
        return survivors / (survivors + left * missed)

    at_random = survivors / (survivors + 1)
    number, values = round(survivors), by_source.tolist()
    row = _row("rejected better", number, values, at_random, len(drawn), weights)
    estimate = {
        "measure": "recall, estimated",
        "value": share_kept(row["value"]),
        "low": share_kept(row["high"]),
        "high": share_kept(row["low"]),
        "chance": share_kept(at_random),
    }
    return [row, row | estimate]


def _row(
    measure: str,
    kept: int,
    by_source: Sequence[float],
    chance: float,
    pairs: int,
    weights: Sequence[float] | None = None,
) -> dict[str, Any]:
    weighing = np.ones(len(by_source)) if weights is None else np.asarray(weights, float)
    value = float(np.average(by_source, weights=weighing)) if by_source else math.nan
    if measure == "rank correlation":
        low, high = _mean_limits(by_source)
    else:
        low, high = _share_limits(value, float(weighing.sum() ** 2 / (weighing**2).sum()))
    return {
        "measure": measure,
        "kept": kept,
        "value": value,
        "low": low,
        "high": high,
        "chance": chance,
        "n_sources": len(by_source),
        "n_pairs": pairs,
    }


def _share_limits(share: float, number: float) -> tuple[float, float]:
    """Wilson's 95% interval (1927) of a mean of shares, as if each were 0 or 1: the widest case.

    `number` of them; where they have weights, as many equal ones as would vary alike (Kish 1965).
    """
    z = float(norm.ppf(0.975))
    middle = share + z**2 / (2 * number)
    reach = z * math.sqrt(share * (1 - share) / number + z**2 / (4 * number**2))
    scale = 1 + z**2 / number
    return max(0.0, (middle - reach) / scale), min(1.0, (middle + reach) / scale)


def _mean_limits(values: Sequence[float]) -> tuple[float, float]:
    """95% t interval."""
    number = len(values)
    if number < 2:
        return math.nan, math.nan
    reach = student.ppf(0.975, number - 1) * np.std(values, ddof=1) / math.sqrt(number)
    return float(np.mean(values) - reach), float(np.mean(values) + reach)
