"""What the tables of `damage` say in words."""

from collections.abc import Mapping

import pandas as pd

from moescope.analyses.damage.measures import MEASURES
from moescope.measures.bootstrap import FEWEST_UNITS
from moescope.runs import Finding

SIGNIFICANT = 0.05
"""Of p-values after Holm's correction."""
DONE = {
    "zero": "Expert's output set to zero",
    "mask": "Expert masked, as after pruning",
    "swap": "Two experts swapped",
    "substitute": "Expert replaced by another behind an adapter",
}
"""Kinds of change, in words."""


def findings(
    tables: Mapping[str, pd.DataFrame], refused: Mapping[str, int] | None = None
) -> list[Finding]:
    """For each kind of change: what foretells it, and what is not shown to be better.

    Args:
        tables: Of the result.
        refused: How many changes of a kind could not be made.
    """
    table = tables["damage"]
    if table.empty:
        return [Finding(text="There are too few changes to put in order.")]
    kinds = list(dict.fromkeys(table["kind"]))
    found = [_best(kind, tables) for kind in kinds]
    found.append(_settled(tables["reliability"]))
    if table["p_corrected"].notna().any():
        found.append(_depth(table))
    if tables["changes"]["n_documents"].iloc[0] < FEWEST_UNITS:
        text = f"There are no intervals: losses are of fewer than {FEWEST_UNITS} documents."
        found.append(Finding(text=text))
    if refused:
        said = ", ".join(f"{DONE[kind].lower()} {number}" for kind, number in refused.items())
        text = (
            f"Changes that could not be made are left out ({said}): no adapter could be fitted for "
            "want of tokens, or the model refused them."
        )
        found.append(Finding(text=text, numbers={f"refused_{k}": n for k, n in refused.items()}))
    return found


def _best(kind: str, tables: Mapping[str, pd.DataFrame]) -> Finding:
    rows = tables["damage"].query("kind == @kind and ranks == 'within layers'")
    rows = rows.dropna(subset="correlation").sort_values("correlation", ascending=False)
    if rows.empty:
        return Finding(text=f"{DONE[kind]}: no measure can be put in order within layers.")
    top = rows.iloc[0]
    changes = tables["changes"].query("kind == @kind")["rise"]
    clear = rows[(rows["p_corrected"] <= SIGNIFICANT) & (rows["correlation"] > 0)]
    wrong = rows[(rows["p_corrected"] <= SIGNIFICANT) & (rows["correlation"] < 0)]
    text = (
        f"{DONE[kind]} ({len(changes)} changes, median rise of the loss {changes.median():+.4f} "
        f"nats per token, {changes.min():+.4f} to {changes.max():+.4f}): within layers the damage "
        f"follows {_name(top['measure'])} most, the highest of {len(rows)} rank correlations: "
        f"{_value(top)}. "
    )
    tested = int(rows["p_corrected"].notna().sum())
    if tested:
        text += f"{len(clear)} of {tested} measures foretell it beyond chance (Holm, p <= 0.05)"
        text += f": {', '.join(_name(m) for m in clear['measure'])}." if len(clear) else "."
    else:
        text += "None can be told from chance."
    if len(wrong):
        text += f" Against expectation: {', '.join(_name(m) for m in wrong['measure'])}."
    text += _against(kind, top["measure"], tables["differences"]) if len(clear) else ""
    numbers = {"correlation": top["correlation"], "clear": len(clear), "measures": len(rows)}
    return Finding(text=text, numbers=numbers | {"measure": top["measure"]})


def _against(kind: str, top: str, differences: pd.DataFrame) -> str:
    """Which of the others the first measure is shown to be better than."""
    if differences.empty:
        return ""
    rows = differences.query("kind == @kind and ranks == 'within layers'")
    rows = rows[(rows["measure"] == top) | (rows["other"] == top)]
    clear = rows[(rows["p_corrected"] <= SIGNIFICANT)]
    named = zip(clear["measure"], clear["other"], strict=True)
    others = [other if measure == top else measure for measure, other in named]
    if not others:
        return f" It is not shown to be better than any of the other {len(rows)}."
    return (
        f" It is better than {', '.join(map(_name, others))} (paired difference, corrected over "
        f"all pairs of measures), and not shown to be better than the other "
        f"{len(rows) - len(others)}."
    )


def _settled(reliability: pd.DataFrame) -> Finding:
    rows = reliability[reliability["ranks"] == "within layers"]
    said = [
        f"{DONE[row['kind']].lower()} {row['agreement']:.2f} ({row['ceiling']:.2f})"
        for _, row in rows.iterrows()
    ]
    text = (
        "How far two halves of the documents agree on the order of the damage within layers, as a "
        "rank correlation, and in brackets about the most that a measure could reach on all of "
        f"them: {'; '.join(said)}. {int(rows['n_documents'].iloc[0])} documents, "
        f"{int(rows['n_tokens'].iloc[0]):,} tokens."
    )
    numbers = {f"agreement_{row['kind']}": row["agreement"] for _, row in rows.iterrows()}
    return Finding(text=text, numbers=numbers)


def _depth(table: pd.DataFrame) -> Finding:
    """Where pooling all layers would have said something else."""
    keys = ["kind", "measure"]
    sides = [table[table["ranks"] == r].set_index(keys) for r in ("within layers", "pooled")]
    within, pooled = (side[side["status"].isin(("ok", "at_limit"))] for side in sides)
    clear = [
        set(side[(side["p_corrected"] <= SIGNIFICANT) & (side["correlation"] > 0)].index)
        for side in (within, pooled)
    ]
    only = sorted(clear[1] - clear[0])
    text = (
        f"All layers pooled, {len(clear[1])} of {len(pooled)} correlations are clear of zero, "
        f"within layers {len(clear[0])} of {len(within)}: {len(only)} only pooled, where the depth "
        "of a layer may be all that damage and measure have in common."
    )
    return Finding(text=text, numbers={"within": len(clear[0]), "pooled": len(clear[1])})


def _name(measure: str) -> str:
    return MEASURES[measure].label


def _value(row: pd.Series) -> str:
    value = f"{row['correlation']:.2f}"
    if pd.isna(row["correlation_low"]):
        return f"{value} ({row['n_changes']} changes, no interval: {row['status']})"
    return (
        f"{value} (95% interval {row['correlation_low']:.2f} to {row['correlation_high']:.2f}, "
        f"{row['n_changes']} changes)"
    )
