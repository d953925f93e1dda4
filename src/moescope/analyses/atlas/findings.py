"""What an atlas says in words, and what it does not."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from moescope.alignment.score import NARROW
from moescope.analyses.atlas.tables import LEVEL
from moescope.runs import Finding

_MOST_NAMED = 4
_UNITS = ((86_400, "days"), (3_600, "hours"), (60, "minutes"), (1, "seconds"))


def findings(tables: Mapping[str, pd.DataFrame]) -> list[Finding]:
    """Sentences that the tables carry, most important first."""
    pairs = tables["atlas"]
    measured = pairs[pairs["fvu"].notna()] if "fvu" in pairs else pairs[:0]
    if measured.empty:
        return [Finding(text=f"No number could be had for the {_looked_at(pairs)}.")]
    scored = measured[measured["score"].notna()]
    return [
        *([_claims(pairs, scored), *_where(tables["layers"])] if len(scored) else []),
        *_unscored(measured),
        _errors(pairs, measured),
        *_screening(tables["recall"]),
        *_refused(pairs),
        *_cost(tables["cost"], len(pairs), len(measured)),
    ]


def _looked_at(pairs: pd.DataFrame) -> str:
    sources = pairs.groupby(["source_layer", "source_expert"]).ngroups
    layers = pairs.groupby(["source_layer", "target_layer"]).ngroups
    return f"{len(pairs):,} pairs of {sources} experts in {layers} ordered pairs of layers"


def _claims(pairs: pd.DataFrame, scored: pd.DataFrame) -> Finding:
    tested = scored[scored["score_low"].notna()]
    claimed = tested[tested["claimed"]]
    below = int((tested["p_value"] < LEVEL).sum())
    best = scored.iloc[int(scored["score"].argmax())]
    if tested.empty:
        text = (
            f"Of {_looked_at(pairs)}, {len(scored)} got a score and none an interval: there are "
            "too few held-out documents."
        )
    else:
        text = (
            f"Of {_looked_at(pairs)}, {len(tested)} got a score with an interval. "
            f"{len(claimed) or 'None'} of them beat{'s' * (len(claimed) <= 1)} the controls after "
            f"Holm's correction for all {len(pairs):,} pairs (p < {LEVEL}). Without it {below} "
            f"would, of which chance would give at most {LEVEL * len(tested):.1f} were the "
            f"{len(tested)} pairs not chosen."
        )
    interval = (
        f"95% interval {best.score_low:.2f} to {best.score_high:.2f}, not corrected; "
        if best.score_low == best.score_low
        else ""
    )
    text += (
        f" Largest score: expert {best.source_expert} of layer {best.source_layer} imitated by "
        f"expert {best.target_expert} of layer {best.target_layer}, {best.score:.2f} ({interval}"
        f"{best.n_val:.0f} held-out tokens of {best.n_documents:.0f} documents)."
    )
    numbers = {
        "pairs": len(pairs),
        "tested": len(tested),
        "claimed": len(claimed),
        "without_correction": below,
        "best_score": float(best.score),
    }
    return Finding(text=text, numbers=numbers)


def _where(layers: pd.DataFrame) -> list[Finding]:
    """In which pairs of layers, where anything was claimed."""
    found = layers[layers["claimed"] > 0].sort_values("claimed", ascending=False, kind="stable")
    if found.empty:
        return []
    named = [
        f"{row.source_layer} \u2192 {row.target_layer} ({row.claimed} of {row.tested}, median "
        f"score {row.median_score:.2f})"
        for row in found.head(_MOST_NAMED).itertuples()
    ]
    left = len(found) - len(named)
    text = f"Claimed pairs lie in {len(found)} of {len(layers)} pairs of layers: {', '.join(named)}"
    text += f", and {left} more." if left else "."
    return [Finding(text=text, numbers={"layer_pairs_claimed": len(found)})]


def _unscored(measured: pd.DataFrame) -> list[Finding]:
    """Pairs whose controls leave no room for a score."""
    number = int((measured["status"] == "undefined").sum())
    if not number:
        return []
    text = (
        f"{number} of {len(measured)} fitted pairs have no score: the best control, such as a "
        f"linear map, comes within {NARROW} of what the source itself reaches behind a hidden "
        "rotation."
    )
    return [Finding(text=text, numbers={"undefined": number})]


def _errors(pairs: pd.DataFrame, measured: pd.DataFrame) -> Finding:
    """Of the pairs that screening kept, beside their controls."""
    kept = measured[measured["stage"] == "converged"]
    medians = kept[["fvu", "fvu_linear", "fvu_random", "fvu_self"]].median()
    linear = int((kept["fvu_linear"] <= kept["fvu"]).sum())
    which = f"the {len(kept)} pairs that screening kept"
    if (pairs["stage"] == "converged").all():
        which = f"all {len(kept)} pairs"
    text = (
        f"Held-out FVU of {which}, median {medians.fvu:.2f}: a "
        f"linear map without any expert leaves {medians.fvu_linear:.2f}, and is as good or better "
        f"in {linear} of them"
    )
    if np.isfinite(medians.fvu_random):
        random = int((kept["fvu_random"] <= kept["fvu"]).sum())
        text += (
            f"; random experts leave {medians.fvu_random:.2f}, and are in {random}; the source "
            f"itself behind a hidden rotation leaves {medians.fvu_self:.2f}"
        )
    return Finding(text=f"{text}.", numbers={"median_fvu": float(medians.fvu), "linear": linear})


def _screening(recall: pd.DataFrame) -> list[Finding]:
    rows: dict[Any, dict[Any, Any]] = {row["measure"]: row for row in recall.to_dict("records")}
    if estimate := rows.get("recall, estimated"):
        better = rows["rejected better"]
        text = (
            f"Of {better['n_pairs']} random pairs that screening had rejected, {_share(better)} "
            "have a smaller FVU than the worst that it kept of the same layer: it keeps about "
            f"{_share(estimate)} of the pairs that are at least as good as that one; by chance it "
            f"would keep {estimate['chance']:.0%}. Intervals are over {better['n_sources']} "
            "experts."
        )
        return [Finding(text=text, numbers={"recall": estimate["value"]})]
    if not (ranks := rows.get("rank correlation")):
        return []
    first = recall[recall["measure"] == "best kept"].head(3).to_dict("records")
    named = [f"{_share(row)} among the first {row['kept']}" for row in first]
    chances = ", ".join(f"{row['chance']:.0%}" for row in first)
    text = (
        "Every pair was fitted, so that the screening can be judged: it has the best target of a "
        f"layer {', '.join(named)} (by chance {chances}). "
        f"Its rank correlation with the held-out FVU is {ranks['value']:.2f} ({ranks['low']:.2f} "
        f"to {ranks['high']:.2f}). Means over {ranks['n_sources']} experts, {ranks['n_pairs']:,} "
        "pairs."
    )
    return [Finding(text=text, numbers={"rank_correlation": ranks["value"]})]


def _share(row: Mapping[Any, Any]) -> str:
    return f"{row['value']:.0%} ({row['low']:.0%} to {row['high']:.0%})"


def _refused(pairs: pd.DataFrame) -> list[Finding]:
    """Pairs without numbers although they were to have some."""
    missing = pairs[pairs["status"].notna() & pairs["fvu"].isna()]
    if missing.empty:
        return []
    sources = missing.groupby(["source_layer", "source_expert"]).ngroups
    why = ", ".join(sorted(str(status).replace("_", " ") for status in missing["status"].unique()))
    text = f"{sources} experts could not be imitated by any other for want of numbers: {why}."
    return [Finding(text=text, numbers={"sources_without_numbers": sources})]


def _cost(cost: pd.DataFrame, pairs: int, fitted: int) -> list[Finding]:
    """What was computed in this call, and what the other pairs would have taken."""
    rows: dict[Any, dict[Any, Any]] = {row["fits_of"]: row for row in cost.to_dict("records")}
    if not (row := rows.get("converged")):
        return []
    text = (
        f"This call computed {row['fits']:,} converged fits, controls among them, in "
        f"{duration(row['seconds'])}, {row['operations'] / row['seconds'] / 1e9:.1f} GFLOP/s"
    )
    if short := rows.get("short"):
        text += f", and {short['fits']:,} short ones in {duration(short['seconds'])}"
    text += "."
    if fitted < pairs:
        left = (pairs - fitted) / fitted
        text += f" Those of all other pairs would take about {left:.1f} times as many again."
    return [Finding(text=text, numbers={"converged_seconds": row["seconds"]})]


def duration(seconds: float) -> str:
    """In words, in the largest unit of which there are two."""
    size, unit = next(((s, u) for s, u in _UNITS if seconds >= 2 * s), _UNITS[-1])
    return f"{seconds / size:,.1f} {unit}"
