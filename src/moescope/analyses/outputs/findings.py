"""What the tables of `outputs` say in words."""

from collections.abc import Mapping

import pandas as pd

from moescope.analyses.outputs.tables import CONTRAST
from moescope.runs import Finding

SIGNIFICANT = 0.05
"""Of p-values after Holm's correction."""


def findings(tables: Mapping[str, pd.DataFrame], *, weighs_inputs: bool) -> list[Finding]:
    """Likeness by depth, chosen against not, without first positions; norms against scores."""
    found = [
        _depth(tables["outputs"]),
        _chosen(tables["outputs"]),
        _first(tables["outputs"]),
        _preference(tables["norms"]),
        _expert_norms(tables["experts"]),
        _by_weights(tables),
    ]
    if weighs_inputs:
        found.append(
            Finding(
                text="In this family the router's weight scales what goes into an expert: compared "
                "are outputs for inputs without it, which the model itself never computes."
            )
        )
    if (tables["outputs"]["status"] == "few_documents").any():
        few = int(tables["outputs"]["n_documents"].max())
        found.append(Finding(text=f"No intervals: too few documents ({few})."))
    return found


def _depth(table: pd.DataFrame) -> Finding:
    rows = _rows(table, "angular", "all")
    cosine, centred = (_rows(table, name, "all") for name in ("cosine", "centred_cosine"))
    first, last = rows.iloc[0], rows.iloc[-1]
    text = (
        f"Outputs of two experts of a layer for the same token have a mean angular similarity of "
        f"{_value(first)} in {_place(first)} and {_value(last)} in {_place(last)}, and "
        f"{_range(rows)} over {len(rows)} layers; 0.5 is orthogonal. As cosines {_range(cosine)}, "
        f"and {_range(centred)} once each expert's mean output is taken off. {_sample(first)}"
    )
    return Finding(text=text, numbers={"first": first["value"], "last": last["value"]})


def _chosen(table: pd.DataFrame) -> Finding:
    both, none, contrast = (
        _rows(table, "angular", kind) for kind in ("both_chosen", "none_chosen", CONTRAST)
    )
    if contrast.empty:
        return Finding(text="No token uses two experts and leaves two: there is no such contrast.")
    text = (
        f"Two experts that a token uses have an angular similarity of {_range(both)}, two that it "
        f"does not use {_range(none)}. The difference within tokens is {_range(contrast)} by "
        f"layer{_clear(contrast)}."
    )
    return Finding(text=text, numbers={"difference": contrast["value"].median()})


def _first(table: pd.DataFrame) -> Finding:
    first, later = (_rows(table, "angular", "all", tokens) for tokens in ("first", "later"))
    if first.empty or later.empty:
        return Finding(text="There are no first positions of rows or documents beside others.")
    together = _rows(table, "angular", "all").merge(later, on=["stack", "layer"])
    change = (together["value_x"] - together["value_y"]).abs().max()
    number = int(first["n_tokens"].max())
    text = (
        f"At the {number:,} first positions of rows and documents the angular similarity is "
        f"{_range(first)} by layer, elsewhere {_range(later)}; leaving them out changes the mean "
        f"by at most {change:.2g} in any layer."
    )
    return Finding(text=text, numbers={"change": float(change), "first_positions": number})


def _preference(table: pd.DataFrame) -> Finding:
    spearman, hits, partial = (
        table[(table["tokens"] == "all") & (table["measure"] == name) & table["value"].notna()]
        for name in ("spearman", "hit_rate", "partial")
    )
    if spearman.empty:
        return Finding(text="All outputs of a token are equally long: norms have no ranks.")
    text = (
        f"Does the router prefer long outputs? Spearman's correlation of norm and score within "
        f"tokens is {_range(spearman)} by layer{_clear(spearman)}. The longest output is that of a "
        f"used expert in {_range(hits)} of tokens, where chance is {_range(hits, 'chance')}"
        f"{_clear(hits, 'it')}."
    )
    if len(partial):
        text += (
            f" Given how long each expert is on average the correlation is {_range(partial)}"
            f"{_clear(partial)}."
        )
    numbers = {
        "spearman": spearman["value"].median(),
        "hit_rate": hits["value"].median(),
        "partial": partial["value"].median(),
    }
    return Finding(text=text, numbers=numbers)


def _expert_norms(table: pd.DataFrame) -> Finding:
    norms = table[table["tokens"] == "all"].groupby(["stack", "layer"], sort=False)["mean_norm"]
    ratio = norms.max() / norms.min()
    return Finding(
        text=f"The expert with the longest mean output of a layer is {ratio.min():.2f} to "
        f"{ratio.max():.2f} times as long as the shortest.",
        numbers={"least": ratio.min(), "most": ratio.max()},
    )


def _by_weights(tables: Mapping[str, pd.DataFrame]) -> Finding:
    if "weights_together" not in tables:
        return Finding(
            text="Weights and outputs cannot be held against one another: weights are no plain "
            "numbers, all pairs are equally alike, or there are fewer than three experts."
        )
    layers, together = tables["weights"], tables["weights_together"]
    said, numbers = [], dict[str, float]()
    for (stack, outputs), rows in together.groupby(["stack", "outputs"], sort=False):
        shares = [
            f"{row['weights']} {_value(row)}, p = {row['p_corrected']:.2g}"
            for _, row in rows.iterrows()
        ]
        where = "" if stack == "decoder" else "in the encoder, "
        said.append(f"{where}{str(outputs).replace('_', ' ')} of outputs: {'; '.join(shares)}")
        numbers |= {
            f"{stack}_{outputs}_{row['weights']}": row["value"] for _, row in rows.iterrows()
        }
    clear = int((layers["p_corrected"] <= SIGNIFICANT).sum())
    text = (
        f"Do experts with similar weights give similar outputs? Spearman's correlation over the "
        f"pairs of a layer, mean over layers, by how weights are compared: {'. '.join(said)} (p "
        f"corrected, from {int(layers['permutations'].iloc[0]):,} permutations of the experts of "
        f"all layers at once). Of {layers['value'].notna().sum()} single layers and measures "
        f"{clear} are clear after correction."
    )
    return Finding(text=text, numbers=numbers)


def _rows(table: pd.DataFrame, measure: str, pairs: str, tokens: str = "all") -> pd.DataFrame:
    chosen = (table["measure"] == measure) & (table["pairs"] == pairs)
    return table[chosen & (table["tokens"] == tokens) & table["value"].notna()]


def _value(row: pd.Series) -> str:
    if pd.isna(row["value_low"]):
        return f"{row['value']:z.3f}"
    return f"{row['value']:z.3f} ({row['value_low']:z.3f} to {row['value_high']:z.3f})"


def _range(rows: pd.DataFrame, column: str = "value") -> str:
    """Lowest and highest layer."""
    low, high = f"{rows[column].min():z.3f}", f"{rows[column].max():z.3f}"
    return low if low == high else f"{low} to {high}"


def _clear(rows: pd.DataFrame, level: str = "0") -> str:
    """In how many layers the interval lies beyond chance, which is 0 where none is given."""
    rows = rows[rows["value_low"].notna()]
    if rows.empty:
        return ""
    chance = rows.get("chance", 0.0)
    above, below = (rows["value_low"] > chance).sum(), (rows["value_high"] < chance).sum()
    return f" (by 95% intervals above {level} in {above} and below in {below} of {len(rows)})"


def _place(row: pd.Series) -> str:
    return f"{'' if row['stack'] == 'decoder' else 'encoder '}layer {row['layer']}"


def _sample(row: pd.Series) -> str:
    return f"{int(row['n_tokens']):,} tokens of {int(row['n_documents'])} documents."
