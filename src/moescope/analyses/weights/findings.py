"""What the tables of `weights` say in words."""

from collections.abc import Mapping

import pandas as pd

from moescope.analyses.weights.reading import ALL
from moescope.runs import Finding

SIGNIFICANT = 0.05
"""Of p-values after Holm's correction."""


def findings(tables: Mapping[str, pd.DataFrame]) -> list[Finding]:
    """Likeness by depth, matching, router rows, other layers, ancestor."""
    found = [_likeness(tables["weights"])]
    if not tables["matching"].empty:
        found.append(_matching(tables["matching"]))
    if tables["router"]["r"].notna().any():
        found.append(_router(tables["router"], tables["router_together"]))
    between = tables["layers"]
    across = between[_apart(between) & between["best"].notna()]
    if len(across):
        found.append(_across(between, across))
    if "ancestor" in tables:
        found.append(_ancestor(tables["ancestor"]))
    return found


def _likeness(table: pd.DataFrame) -> Finding:
    rows = {
        measure: table[
            (table["measure"] == measure) & (table["matrix"] == ALL) & table["mean"].notna()
        ]
        for measure in ("cosine", "average")
    }
    cosine, average = rows["cosine"], rows["average"]
    if cosine.empty:
        return Finding(text="One expert per layer: there are no pairs within layers.")
    first, last = cosine.iloc[0], cosine.iloc[-1]
    text = (
        f"As matrices, experts of one layer have a mean cosine of {_value(first)} in "
        f"{_place(first)} and {_value(last)} in {_place(last)}, and {_range(cosine)} over "
        f"{len(cosine)} layers ({int(cosine['n_pairs'].sum())} pairs); single pairs reach "
        f"{cosine['most'].max():.3f}. The means of their neurons have {_range(average)}."
    )
    numbers = {"first": first["mean"], "last": last["mean"], "most": cosine["most"].max()}
    return Finding(text=text, numbers=numbers)


def _matching(table: pd.DataFrame) -> Finding:
    rows = table[table["apart"] == 0]
    rows = table if rows.empty else rows
    by = {measure: rows[rows["measure"] == measure] for measure in ("in_order", "matched", "tau")}
    matched, tau = by["matched"], by["tau"]
    above = int((matched["mean"] > matched["scrambled_high"]).sum())
    text = (
        f"With neurons matched the cosine is {_range(matched)} by layer, {_range(by['in_order'])} "
        f"without. By chance matching finds {matched['gaussian_mean'].mean():.3f} in Gaussian "
        f"experts of equal shape, and {_range(matched, 'scrambled_mean')} in these experts with "
        f"one of each pair scrambled. The mean lies above every scrambled pair in {above} "
        f"of {len(matched)} layers. Kendall's tau of the matching is {_range(tau)}: 1 would "
        "be neurons in the same order."
    )
    numbers = {
        "matched": matched["mean"].mean(),
        "gaussian": matched["gaussian_mean"].mean(),
        "scrambled": matched["scrambled_mean"].mean(),
        "above_scrambled": above,
    }
    return Finding(text=text, numbers=numbers)


def _router(table: pd.DataFrame, together: pd.DataFrame) -> Finding:
    said = []
    numbers: dict[str, float] = {}
    for _, whole in together[together["form"] == "average"].iterrows():
        rows = table[(table["matrix"] == whole["matrix"]) & (table["form"] == "average")]
        clear = int((rows["p_corrected"] <= SIGNIFICANT).sum())
        said.append(
            f"{whole['matrix']} {whole['mean_r']:+.2f} (p = {whole['p_corrected']:.2g} corrected; "
            f"by layer {_range(rows, 'r')}, clear in {clear})"
        )
        numbers |= {
            f"r_{whole['matrix']}": whole["mean_r"],
            f"p_{whole['matrix']}": whole["p_value"],
        }
    matrix = together["matrix"].iloc[0]
    bare = together[(together["form"] == "centred") & (together["matrix"] == matrix)].iloc[0]
    text = (
        f"Do experts with similar router rows have similar mean neurons? Mean correlation over "
        f"{int(together['n_layers'].max())} layers, tested by "
        f"{int(table['permutations'].iloc[0]):,} permutations of the experts: {'; '.join(said)}. "
        f"Without what all experts of a layer have in common, {matrix} has {bare['mean_r']:+.2f} "
        f"(p = {bare['p_corrected']:.2g})."
    )
    return Finding(text=text, numbers=numbers)


def _across(between: pd.DataFrame, across: pd.DataFrame) -> Finding:
    own = between[~_apart(between)]
    top = across.iloc[int(across["best"].argmax())]
    text = (
        f"Across layers an expert's nearest has a mean cosine of at most {top['best']:.3f} "
        f"({_place(top)} and {_place(top, 'other_')}), and {across['best'].median():.3f} in the "
        f"median of {len(across)} pairs of layers; within a layer {_range(own, 'best')}."
    )
    return Finding(text=text, numbers={"best": top["best"], "median": across["best"].median()})


def _ancestor(table: pd.DataFrame) -> Finding:
    rows = table[table["status"] == "ok"]
    if rows.empty:
        return Finding(text="No layer of the ancestor fits the experts, in number or in shape.")
    cosine = rows[f"cosine_{ALL}"]
    text = (
        f"Against the ancestor's layer of the same number, {len(rows)} experts have a cosine of "
        f"{rows['matched'].min():.3f} to {rows['matched'].max():.3f} with neurons matched, where "
        f"Gaussian experts have {rows['gaussian_matched'].mean():.3f}"
    )
    if cosine.notna().any():
        text += f"; with neurons in their order {cosine.min():.3f} to {cosine.max():.3f}"
    return Finding(text=f"{text}.", numbers={"matched": rows["matched"].mean()})


def _apart(between: pd.DataFrame) -> pd.Series:
    return (between["layer"] != between["other_layer"]) | (
        between["stack"] != between["other_stack"]
    )


def _value(row: pd.Series) -> str:
    if pd.isna(row["low"]):
        return f"{row['mean']:.3f}"
    return f"{row['mean']:.3f} ({row['low']:.3f} to {row['high']:.3f})"


def _range(rows: pd.DataFrame, column: str = "mean") -> str:
    return f"{rows[column].min():.3f} to {rows[column].max():.3f}"


def _place(row: pd.Series, other: str = "") -> str:
    stack = "" if row[f"{other}stack"] == "decoder" else "encoder "
    return f"{stack}layer {row[f'{other}layer']}"
