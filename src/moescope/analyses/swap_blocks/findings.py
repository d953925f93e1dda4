"""What the tables of `swap-blocks` say in words."""

import pandas as pd

from moescope.analyses.swap_blocks.options import SwapOptions
from moescope.analyses.swap_blocks.tables import REFUSED, UNCHANGED
from moescope.runs import Finding

_MOST_NAMED = 12
_UNITS = {"accuracy": "", "loss": " nats"}
_SAID = {
    "harmless": "harmless (changed by less than {margin}, corrected p < 0.025)",
    "worse": "for the worse (corrected p < 0.05)",
    "better": "for the better (corrected p < 0.05)",
    "open": "open (neither)",
}


def findings(
    table: pd.DataFrame, distortion: pd.DataFrame, decay: pd.DataFrame, options: SwapOptions
) -> list[Finding]:
    """From changes by swap, the routing, and the trend with distance."""
    done = table[~table["status"].isin([REFUSED, UNCHANGED])]
    measures = [m for m in ("accuracy", "loss") if f"{m}_verdict" in table]
    found = [_extremes(done, measure) for measure in measures]
    found += [
        verdicts(done, measure, getattr(options, f"margin_{measure}")) for measure in measures
    ]
    found += _decay(decay)
    found += routing(distortion)
    found += refusals(table)
    return found


def verdicts(done: pd.DataFrame, measure: str, margin: float) -> Finding:
    """Which swaps are harmless and which are not, in their order."""
    verdict = done[f"{measure}_verdict"]
    if not verdict.any():
        return Finding(text=f"No intervals of the {measure}: too few to resample.")
    parts, numbers = [], dict[str, int]()
    for name, words in _SAID.items():
        swaps = done["swap"][verdict == name].tolist()
        numbers[name] = len(swaps)
        if swaps:
            named = ", ".join(swaps[:_MOST_NAMED])
            more = f" and {len(swaps) - _MOST_NAMED} more" if len(swaps) > _MOST_NAMED else ""
            said = words.format(margin=f"{margin:g}{_UNITS[measure]}")
            parts.append(f"{len(swaps)} {said}: {named}{more}")
    text = f"By {measure}, of {len(done)} swaps {'; '.join(parts)}."
    return Finding(text=text, numbers=numbers)


def _extremes(done: pd.DataFrame, measure: str) -> Finding:
    """The mildest and the worst swap."""
    change = done[f"{measure}_difference"] * (-1 if measure == "accuracy" else 1)
    mild, worst = done.iloc[int(change.argmin())], done.iloc[int(change.argmax())]
    before = mild[measure] - mild[f"{measure}_difference"]
    text = (
        f"Unchanged, the model has {_named(done, measure)} {before:.3f} ({_rests_on(mild)}). The "
        f"mildest of {len(done)} swaps, {mild['swap']}, changes it by {_change(mild, measure)}; "
        f"the worst, {worst['swap']}, by {_change(worst, measure)}."
    )
    numbers = {"unchanged": before} | {
        f"{name}_{measure}_difference": float(row[f"{measure}_difference"])
        for name, row in (("mildest", mild), ("worst", worst))
    }
    return Finding(text=text, numbers=numbers)


def _named(done: pd.DataFrame, measure: str) -> str:
    if measure == "accuracy":
        return "an accuracy of"
    return "a loss in nats per " + ("answer of" if "n_questions" in done else "token of")


def _rests_on(row: pd.Series) -> str:
    if "n_questions" in row:
        return f"{row['n_questions']:,.0f} questions"
    return f"{row['n_tokens']:,.0f} tokens, {row['n_documents']:,.0f} documents"


def _change(row: pd.Series, measure: str) -> str:
    low, high = row[f"{measure}_difference_low"], row[f"{measure}_difference_high"]
    interval = f" (95% interval {low:+.3f} to {high:+.3f})" if pd.notna(low) else ""
    return f"{row[f'{measure}_difference']:+.3f}{interval}"


def _decay(decay: pd.DataFrame) -> list[Finding]:
    found = []
    for _, row in decay.iterrows():
        what = {
            "accuracy": "the loss of accuracy grows by",
            "loss": "the rise of the loss grows by",
            "routing": "the divergence of the decoder's routing (bits) grows by",
        }[row["measure"]]
        interval = ""
        if pd.notna(row["slope_low"]):
            interval = f" (95% interval {row['slope_low']:+.4f} to {row['slope_high']:+.4f})"
        text = f"Per layer of distance {what} {row['slope']:+.4f}{interval}"
        numbers = {"slope": float(row["slope"])}
        if pd.notna(row["rank_correlation"]):
            numbers["rank_correlation"] = float(row["rank_correlation"])
            text += (
                f"; rank correlation {row['rank_correlation']:.2f} over {row['n_swaps']} pairs of "
                f"{row['n_layers']} layers, p = {row['p_corrected']:.3f} by permuting layers"
            )
        text += (
            ". Pairs are few and share layers: the interval is about the text, not about layers."
        )
        found.append(Finding(text=text, numbers=numbers))
    return found


def against_left_out(table: pd.DataFrame, without: pd.DataFrame) -> list[Finding]:
    """What a swap costs, beside what it costs to have no routed experts in one of the layers."""
    column = next(m for m in ("accuracy", "loss") if f"{m}_difference" in table) + "_difference"
    swaps, change = table[table["distance"].notna()][column].dropna(), without[column]
    each = ", ".join(f"{c:+.3f} ({n})" for n, c in zip(without["layer"], change, strict=True))
    text = (
        f"Without its routed experts, a layer changes the {column.partition('_')[0]} by {each}; "
        f"the median swap of two layers by {swaps.median():+.3f}."
    )
    numbers = {"median_left_out": float(change.median()), "median_swap": float(swaps.median())}
    return [Finding(text=text, numbers=numbers)]


def routing(distortion: pd.DataFrame) -> list[Finding]:
    """How far the use of experts moves, by stack, in layers that a swap can reach."""
    found = []
    for stack, rows in distortion[distortion["side"] == "after"].groupby("stack", sort=False):
        top = rows.iloc[int(rows["js_bits"].argmax())]
        above = int((rows["js_bits_low"] > rows["floor_bits"]).sum())
        text = (
            f"In the {stack}, the use of experts of the layers after a swap moves by a median of "
            f"{rows['js_bits'].median():.4f} bits over swaps and layers (Jensen-Shannon), at most "
            f"{top['js_bits']:.4f} (swap {top['swap']}, layer {top['layer']}). In {above} of "
            f"{len(rows)} the lower limit is above what random halves of what was read differ by "
            f"without any swap (median {rows['floor_bits'].median():.4f})."
        )
        numbers = {"median": rows["js_bits"].median(), "most": top["js_bits"], "above": above}
        found.append(Finding(text=text, numbers=numbers))
    return found


def refusals(table: pd.DataFrame) -> list[Finding]:
    """Swaps that cannot be made."""
    refused = table[table["status"] == REFUSED]
    if refused.empty:
        return []
    names = ", ".join(refused["swap"].head(_MOST_NAMED))
    text = f"{len(refused)} swaps cannot be made ({names}): {refused['reason'].iloc[0]}"
    return [Finding(text=text, numbers={"refused": len(refused)})]
