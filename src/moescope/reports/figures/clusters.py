"""Figures of the analysis `clusters`: who is like whom, which cuts are good, and what they cost."""

import altair as alt
import pandas as pd

from moescope.reports.marks import label, tip
from moescope.reports.panels import Panels
from moescope.reports.registry import Figure, figures
from moescope.runs import Result

COLUMNS = {
    "clusters, kept": "Number of clusters that the tree is cut into; each keeps one expert.",
    "silhouette": "Mean silhouette of the experts at that cut; 1: tight clusters far apart.",
    "null_mean, null_high": "Of silhouettes: mean and 95% quantile with the distances dealt out to "
    "pairs at random. Of Rand indices: with the experts of one clustering permuted.",
    "could_go": "Experts that their cluster does not keep.",
    "fvu, fvu_median, fvu_worst": "Error of who stands in, behind its adapter, over the spread of "
    "the outputs, on held-out documents; 1: as bad as a constant.",
    "linear_fvu, linear_median": "The same of a linear map without any expert.",
    "inner_fvu": "The same inside the training documents: what is chosen by.",
    "null": "Inner FVU of the linear map, at most 1.",
    "relative": "inner_fvu over the null of the source; 1: no better than without any expert.",
    "distance": "The larger of the relative errors of both directions.",
    "ari": "Adjusted Rand index of two clusterings; 1: the same, 0: chance.",
    "chosen": "The number of clusters with the largest silhouette in the first of the two.",
    "variant": "How the model is made smaller; see docs/clusters.md.",
    "of_parameters": "Parameters of its experts, adapters and maps over those of all experts.",
    "difference": "Loss minus that of the model as it is, or of the other variant.",
    "p_corrected, verdict": "After Holm's correction for all rows of the table.",
}
_RISE = "rise of the loss (nats per token)"
_EXPERTS = "experts, in the order of the tree"
_STEP = 0.003
"""Share of the parameters between two dots that would hide each other."""


@figures(
    "clusters",
    title="Clusters of experts",
    question="Do experts of all layers fall into clusters, of which each needs one expert?",
    columns=COLUMNS,
)
def draw(result: Result) -> list[Figure]:
    """Distances, cuts, stability, and losses."""
    stability = result.tables["stability"]
    return [
        _matrix(result.tables["pairs"], result.tables["members"]),
        _cuts(result.table),
        *([_stability(stability)] if len(stability) else []),
        _shared(result.tables["shared"]),
    ]


def _matrix(pairs: pd.DataFrame, members: pd.DataFrame) -> Figure:
    names = "L" + members["layer"].astype(str) + "E" + members["expert"].astype(str)
    order = names.iloc[members["order"].argsort()].tolist()
    cluster = dict(zip(names, members["cluster"], strict=True))
    frame = pairs.assign(same=pairs["source"].map(cluster) == pairs["target"].map(cluster))
    axis = alt.Axis(labels=len(order) <= 60, labelOverlap=False)
    upright = alt.Axis(labels=len(order) <= 60, labelOverlap=False, labelAngle=-90)
    tooltip = [
        label("source", "expert"),
        label("target", "stands in for it"),
        tip("relative", "relative error"),
        tip("inner_fvu", "FVU inside the training documents"),
        tip("fvu", "FVU on held-out documents"),
    ]
    most = float(frame["relative"].quantile(0.98))
    colour = alt.Color(
        "relative:Q",
        title="relative error (1: no better than without an expert)",
        scale=alt.Scale(domain=[0, max(most, 1.0)], range="ramp", clamp=True, reverse=True),
    )
    chart = (
        alt.Chart(frame)
        .mark_rect()
        .encode(
            alt.X("target:N", title="stands in", sort=order, axis=upright),
            alt.Y("source:N", title=_EXPERTS, sort=order, axis=axis),
            colour,
            tooltip=tooltip,
        )
    )
    return Figure(
        name="clusters-matrix",
        title="Which experts imitate which?",
        how_to_read="A row is an expert, a column another that stands in for it behind an adapter. "
        "Colour is its error inside the training documents over that of the best linear map "
        "without any expert (or a constant): 0 is a perfect copy, at 1 and above the expert adds "
        "nothing. Rows and columns are in the order of the tree, so that clusters are squares "
        "along the diagonal.",
        limits="Errors depend on what adapters may do, and on the text. A pale square says that "
        "its experts are hard to imitate for all others, not that they are alike.",
        chart=chart.properties(height=max(160, 11 * len(order))),
        panels=Panels(minimum=max(260, 11 * len(order)), preferred=max(400, 14 * len(order))),
    )


def _cuts(table: pd.DataFrame) -> Figure:
    names = {"silhouette": "these distances", "null_high": "dealt out at random, 95% quantile"}
    lines = table.melt(["clusters", "n_experts"], list(names), "series", "value")
    lines["series"] = lines["series"].map(names)
    lines["heading"] = "silhouette"
    errors = {
        "fvu_median": "who stands in (median)",
        "fvu_worst": "who stands in (worst)",
        "linear_median": "linear map, no expert (median)",
    }
    fvu = table.melt(["clusters", "n_experts"], list(errors), "series", "value")
    fvu["series"] = fvu["series"].map(errors)
    fvu["heading"] = "FVU on held-out documents"
    views = [
        _lines(frame, list(series.values()), title)
        for frame, series, title in (
            (lines, names, "silhouette"),
            (fvu, errors, "FVU on held-out documents"),
        )
    ]
    chart = alt.concat(*views).resolve_scale(color="independent")
    size = int(table["n_experts"].iloc[0])
    return Figure(
        name="clusters-cuts",
        title="Into how many clusters do the experts fall, and could the others go?",
        how_to_read=f"The tree of {size} experts is cut into as many clusters as written below. "
        "First panel: mean silhouette, and what 95% of random distances stay below. Second panel: "
        "error of the experts that each cluster keeps, behind their adapters, in the place of "
        "those that it does not, on held-out documents; 1 is as bad as a constant.",
        limits="A silhouette above that of random distances may come from a few experts that are "
        "hard to imitate. The errors are those of single experts: what it costs to replace many "
        "at once is the loss below.",
        chart=chart,
        panels=Panels(count=2, minimum=260, preferred=360),
        table=table,
    )


def _lines(frame: pd.DataFrame, order: list[str], title: str) -> alt.Chart:
    scale = alt.Scale(nice=False, zero=False)
    chart: alt.Chart = (
        alt.Chart(frame)
        .mark_line(point=alt.OverlayMarkDef(size=18))
        .encode(
            alt.X("clusters:Q", title="clusters", scale=scale, axis=alt.Axis(tickMinStep=1)),
            alt.Y("value:Q", title=title),
            alt.Color(
                "series:N",
                title=None,
                scale=alt.Scale(domain=order, range="category"),
                legend=alt.Legend(columns=1, symbolType="circle", orient="top", labelLimit=300),
            ),
            tooltip=[
                label("series", "of"),
                tip("clusters", "clusters", "d"),
                tip("value", title),
                tip("n_experts", "experts", "d"),
            ],
        )
        .properties(height=200)
    )
    return chart


def _stability(table: pd.DataFrame) -> Figure:
    order = table["comparison"].unique().tolist()
    colour = alt.Color(
        "comparison:N",
        title="clustered again with",
        scale=alt.Scale(domain=order, range="category"),
        legend=alt.Legend(columns=3, symbolType="circle"),
    )
    own = table[table["comparison"] == order[0]]
    scale = alt.Scale(nice=False, zero=False)
    x = alt.X("clusters:Q", title="clusters", scale=scale, axis=alt.Axis(tickMinStep=1))
    band = (
        alt.Chart(own)
        .mark_line(strokeDash=[4, 3], opacity=0.7)
        .encode(
            x,
            alt.Y("null_high:Q"),
            tooltip=[tip("null_high", "95% quantile under permuted experts")],
        )
    )
    lines = (
        alt.Chart(table)
        .mark_line(point=alt.OverlayMarkDef(size=22))
        .encode(
            x,
            alt.Y("ari:Q", title="adjusted Rand index"),
            colour,
            alt.Detail("draw:N"),
            tooltip=[
                label("comparison", "with"),
                tip("draw", "random choice", "d"),
                tip("clusters", "clusters", "d"),
                tip("ari", "adjusted Rand index"),
                tip("p_value", "p under permuted experts"),
                tip("n_experts", "experts", "d"),
            ],
        )
    )
    best = own[own["chosen"]].iloc[0]
    return Figure(
        name="clusters-stability",
        title="Are they the same clusters on other text?",
        how_to_read=f"{int(best['n_experts'])} experts are clustered twice; 1 says that both "
        "clusterings are the same, 0 that they agree as chance would. Other documents: disjoint "
        "halves of the training documents. Other seed: all of them, with another seed of the "
        "fits. Random experts: the second half, with random experts in the place of all targets; "
        "what agrees there is not due to what the experts do. Dashed: the 95% quantile with "
        f"experts permuted. By silhouette the first half falls into {int(best['clusters'])}.",
        limits="With few experts the index jumps. Only the comparison at the number of clusters "
        "with the largest silhouette was chosen beforehand.",
        chart=alt.layer(band, lines).properties(height=230),
        panels=Panels(minimum=320, preferred=620),
    )


def _shared(table: pd.DataFrame) -> Figure:
    rows = table[table["domain"] == "all"]
    order = rows["variant"].unique().tolist()
    measured = ["difference", "difference_low", "difference_high", "of_parameters", "experts"]
    counts = ["n_tokens", "n_documents"]
    frame = rows.groupby(["variant", "kept"], sort=False, as_index=False).agg(
        dict.fromkeys([*measured, *counts], "mean") | {"draw": "count"}
    )
    place = frame["variant"].map(order.index) - (len(order) - 1) / 2
    frame["shown"] = frame["of_parameters"] + _STEP * place
    x = alt.X(
        "shown:Q",
        title="parameters of experts, adapters and maps, against all experts",
        scale=alt.Scale(zero=False, padding=14),
        axis=alt.Axis(format=".0%", tickCount=8),
    )
    colour = alt.Color(
        "variant:N",
        title=None,
        scale=alt.Scale(domain=order, range="category"),
        legend=alt.Legend(columns=3, symbolType="circle"),
    )
    base = alt.Chart(frame)
    scale = alt.Scale(type="symlog", constant=0.1, nice=False, padding=8)
    spread = base.mark_rule(opacity=0.5, tooltip=None).encode(
        x, alt.Y("difference_low:Q", scale=scale), alt.Y2("difference_high:Q"), colour
    )
    points = base.mark_point(filled=True, opacity=1, size=42).encode(
        x,
        alt.Y("difference:Q", title=_RISE, scale=scale),
        colour,
        tooltip=[
            label("variant", "variant"),
            tip("kept", "clusters", "d"),
            tip("experts", "experts kept", "d"),
            tip("draw", "random choices", "d"),
            tip("of_parameters", "parameters", ".1%"),
            tip("difference", _RISE),
            tip("difference_low", "from"),
            tip("difference_high", "to"),
            tip("n_tokens", "tokens", ","),
            tip("n_documents", "documents", ","),
        ],
    )
    zero = base.mark_rule(style="reference", tooltip=None).encode(y=alt.datum(0))
    return Figure(
        name="clusters-shared",
        title="What is lost when clusters share an expert?",
        how_to_read="A dot is a model in which every cluster keeps one expert, and the others are "
        "this one behind an adapter: across (what it takes to store), the rise of the loss on "
        "held-out documents up, with 95% intervals over documents; of random clusters the means "
        "over draws. Dots that take as much stand side by side. Merged: experts of a layer "
        "averaged (HC-SMoE), as many as the same parameters pay for. Linear maps and mean outputs "
        "take the place of the same experts, with no expert behind them. The scale widens around "
        "zero.",
        limits="Nothing was trained after sharing but the adapters, one by one, on the model as it "
        "is. Paired differences of the variants are in the table `against`.",
        chart=alt.layer(zero, spread, points).properties(height=280),
        panels=Panels(minimum=340, preferred=700),
        table=rows,
    )
