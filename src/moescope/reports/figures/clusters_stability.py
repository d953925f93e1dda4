"""Figure of `clusters`: the same experts clustered again."""

import altair as alt
import pandas as pd

from moescope.reports.figures.clusters_losses import coloured
from moescope.reports.marks import label, tip
from moescope.reports.panels import Panels
from moescope.reports.registry import Figure


def again(table: pd.DataFrame) -> Figure:
    """Agreement of two clusterings, by the number of clusters."""
    order = table["comparison"].unique().tolist()
    own = table[table["comparison"] == order[0]]
    x = alt.X("clusters:O", title="clusters", axis=alt.Axis(labelAngle=0))
    offset = alt.XOffset("comparison:N", sort=order)
    limit = (
        alt.Chart(own)
        .mark_tick(style="reference", size=18)
        .encode(
            x,
            alt.Y("null_high:Q"),
            offset,
            tooltip=[tip("null_high", "95% quantile with errors dealt out")],
        )
    )
    points = (
        alt.Chart(table)
        .mark_point(filled=True, size=42)
        .encode(
            x,
            alt.Y("ari:Q", title="adjusted Rand index"),
            offset,
            coloured("comparison", order),
            tooltip=[
                label("comparison", "with"),
                tip("draw", "random choice", "d"),
                tip("clusters", "clusters", "d"),
                tip("ari", "adjusted Rand index"),
                tip("p_value", "p with errors dealt out"),
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
        "what agrees there is not due to what the experts do. A dash: the 95% quantile on other "
        "documents with the errors of each expert dealt out to the others at random. By "
        f"silhouette the first half falls into {int(best['clusters'])} clusters.",
        limits="With few experts the index jumps. Only the comparison at the number of clusters "
        "with the largest silhouette was chosen beforehand.",
        chart=alt.layer(limit, points).properties(height=230),
        panels=Panels(minimum=320, preferred=620),
    )
