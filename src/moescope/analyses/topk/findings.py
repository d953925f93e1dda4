"""What the tables of `topk` say in words."""

import pandas as pd

from moescope.analyses.topk.tables import ALL_LAYERS
from moescope.corpora.corpus import RESERVED_DOMAIN
from moescope.runs import Finding

_TREATMENTS = {
    "as_is": "with weights as they are",
    "same_mass": "with their sum kept",
    "to_one": "with a sum of one",
}


def findings(losses: pd.DataFrame, cost: pd.DataFrame, published: pd.DataFrame) -> list[Finding]:
    """From losses by setting and domain, cost by k, and the published number."""
    together = losses[losses["layers"] == ALL_LAYERS]
    overall = together[together["domain"] == RESERVED_DOMAIN]
    found = [_together(overall), *_domains(together), *_layers(losses), *_published(published)]
    found.append(_cost(cost))
    if (losses["status"] == "few_documents").any():
        few = losses[losses["status"] == "few_documents"]["domain"].unique()
        found.append(Finding(text=f"No intervals, for lack of documents: {', '.join(few)}."))
    return found


def _together(overall: pd.DataFrame) -> Finding:
    """The least k from 1 that was tried, and k = 0."""
    most = int(overall["k"].max())
    k = _fewest_experts(overall)
    rows = overall[overall["k"] == k]
    said = [f"{_change(row)} {_TREATMENTS[row['weights']]}" for _, row in rows.iterrows()]
    text = (
        f"With {k} of {most} routed experts per token in every layer the loss changes by "
        f"{'; by '.join(said)}."
    )
    without = overall[overall["k"] == 0]
    if k and len(without):
        text += f" Without any routed expert it changes by {_change(without.iloc[0])}."
    numbers = {f"difference_{row['weights']}": row["difference"] for _, row in rows.iterrows()}
    return Finding(text=text, numbers={"k": k, "top_k": most} | numbers)


def _change(row: pd.Series) -> str:
    interval = ""
    if pd.notna(row["difference_low"]):
        low, high = row["difference_low"], row["difference_high"]
        interval = f" (95% interval {low:+.3f} to {high:+.3f})"
    return f"{row['difference']:+.3f} nats per token{interval}"


def _fewest_experts(frame: pd.DataFrame) -> int:
    """The least k that was tried; 0 only where there is nothing between it and all."""
    tried = sorted(frame["k"].unique())
    return int(next((k for k in tried if 0 < k < tried[-1]), tried[0]))


def _domains(together: pd.DataFrame) -> list[Finding]:
    """Where the least k costs most and least."""
    named = together[together["domain"] != RESERVED_DOMAIN]
    weights = named["weights"].iloc[0]
    rows = named[(named["weights"] == weights) & (named["k"] == _fewest_experts(named))]
    if len(rows) < 2:
        return []
    rows = rows.sort_values("difference")
    low, high = rows.iloc[0], rows.iloc[-1]
    text = (
        f"By domain, {_TREATMENTS[weights]}, that costs least in {low['domain']} "
        f"({_change(low)}) and most in {high['domain']} ({_change(high)})."
    )
    numbers = {"least": low["difference"], "most": high["difference"]}
    return [Finding(text=text, numbers=numbers)]


def _layers(losses: pd.DataFrame) -> list[Finding]:
    """The layer that misses its experts most."""
    alone = losses[(losses["layers"] != ALL_LAYERS) & (losses["domain"] == RESERVED_DOMAIN)]
    if alone.empty:
        return []
    weights, k = alone["weights"].iloc[0], _fewest_experts(alone)
    rows = alone[(alone["weights"] == weights) & (alone["k"] == k)]
    top = rows.loc[rows["difference"].idxmax()]
    text = (
        f"One layer at a time, {_TREATMENTS[weights]}, layer {top['layers']} loses most with "
        f"{k}: {_change(top)}; the median layer loses {rows['difference'].median():+.3f}."
    )
    return [Finding(text=text, numbers={"layer": top["layers"], "loss": top["difference"]})]


def _published(published: pd.DataFrame) -> list[Finding]:
    if published.empty or published["k"].max() == 1:
        return []
    table = published.pivot_table(index="domain", columns="k", values="mean_perplexity")
    rise = table[table.columns.min()] / table[table.columns.max()] - 1
    text = (
        f"The number that MoE Lens published, the mean of per-document perplexity, rises by "
        f"{rise.min():.0%} to {rise.max():.0%} by domain from {table.columns.max()} experts to "
        f"{table.columns.min()}."
    )
    return [Finding(text=text, numbers={"least_rise": rise.min(), "most_rise": rise.max()})]


def _cost(cost: pd.DataFrame) -> Finding:
    row, full = cost[cost["k"] == _fewest_experts(cost)].iloc[0], cost.iloc[-1]
    share = row["active_parameters"] / full["active_parameters"]
    text = (
        f"With {row['k']} instead of {full['k']} a token meets {share:.0%} of the parameters, and "
        f"a text is read in {row['ratio']:.2f} of the time (median of {row['repeats']} rounds of "
        f"{row['tokens_per_pass']} tokens on {row['device']}, {row['threads']} threads); the "
        "weights in memory stay the same."
    )
    return Finding(text=text, numbers={"active_share": share, "time_ratio": row["ratio"]})
