"""Figures of the analysis `clusters`: who is like whom, which cuts are good, and what they cost."""

from collections.abc import Mapping

import altair as alt
import pandas as pd

from moescope.reports.figures.clusters_losses import shared
from moescope.reports.figures.clusters_stability import again
from moescope.reports.marks import label, tip
from moescope.reports.panels import Panels
from moescope.reports.registry import Figure, figures
from moescope.runs import Result

COLUMNS = {
    "clusters, kept": "Number of clusters that the tree is cut into; each keeps one expert.",
    "silhouette": "Mean silhouette of the experts at that cut; 1: tight clusters far apart.",
    "null_mean, null_high": "Mean and 95% quantile with the errors of each expert dealt out to the "
    "others at random, so that how easy each is to imitate and how well each imitates stay; of "
    "Rand indices, in one of the two clusterings.",
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
    "least, most": "Of the difference, over the draws of random clusters.",
    "p_corrected, verdict": "After Holm's correction for all rows of the table; of random "
    "clusters, for other documents and for one more draw.",
}
_EXPERTS = "experts, in the order of the tree"


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
        *([again(stability)] if "other documents" in set(stability["comparison"]) else []),
        shared(result.tables["shared"]),
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
    names = {"silhouette": "these distances", "null_high": "errors dealt out, 95% quantile"}
    errors = {
        "fvu_median": "who stands in (median)",
        "fvu_worst": "who stands in (worst)",
        "linear_median": "linear map, no expert (median)",
    }
    views = [
        _lines(table, series, title)
        for series, title in ((names, "silhouette"), (errors, "FVU on held-out documents"))
    ]
    chart = alt.concat(*views).resolve_scale(color="independent")
    size = int(table["n_experts"].iloc[0])
    return Figure(
        name="clusters-cuts",
        title="Into how many clusters do the experts fall, and could the others go?",
        how_to_read=f"The tree of {size} experts is cut into as many clusters as written below. "
        "First panel: mean silhouette, and the 95% quantile with the errors of each expert dealt "
        "out to the others at random. Second panel: error of the experts that each cluster keeps, "
        "behind their adapters, in the place of those that it does not, on held-out documents; 1 "
        "is as bad as a constant.",
        limits="A silhouette above the other line says that some experts are more alike than how "
        "easy they are to imitate explains, not that they do the same. The errors are those of "
        "single experts: what it costs to replace many at once is the loss below.",
        chart=chart,
        panels=Panels(count=2, minimum=260, preferred=360),
        table=table,
    )


def _lines(table: pd.DataFrame, series: Mapping[str, str], title: str) -> alt.Chart:
    """One line per column in `series`, called what stands there."""
    frame = table.melt(["clusters", "n_experts"], list(series), "series", "value")
    frame["series"] = frame["series"].map(series)
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
                scale=alt.Scale(domain=list(series.values()), range="category"),
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
