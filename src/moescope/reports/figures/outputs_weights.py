"""The figure of `outputs` about weights."""

import altair as alt
import pandas as pd

from moescope.reports.figures.outputs_layers import by_layer, series, spread
from moescope.reports.figures.weights_matrices import Layered
from moescope.reports.marks import label, tip
from moescope.reports.panels import Panels
from moescope.reports.registry import Figure

WEIGHTS_COLUMNS = {
    "weights, weights_": "How alike two experts are as matrices, gate, up and down counting the "
    "same: cosine; average, of the means of neurons; matched, after the best permutation of "
    "neurons; cka, which forgives any rotation of neurons.",
    "p_value, p_corrected": "Mantel's test, by permuting experts; after Holm's correction over the "
    "table.",
    "status": "Of correlations: at_limit, a correlation of 1 or -1, which has no interval.",
}
_WEIGHTS = {
    "cosine": "as matrices",
    "average": "means of neurons",
    "matched": "neurons matched",
    "cka": "CKA",
}


def weights_figure(table: pd.DataFrame, pairs: pd.DataFrame) -> Figure:
    """Correlations by layer, and the pairs behind two of them."""
    rows = table[(table["outputs"] == "cosine") & table["value"].notna()]
    rows = rows.assign(series=rows["weights"].map(_WEIGHTS))
    curves = [
        by_layer(part, series(part), f"correlation, {name}", 0.0, label("series", "weights"))
        for name, part in rows.groupby("series", sort=False)
    ]
    shown = [measure for measure in ("cosine", "matched") if f"weights_{measure}" in pairs]
    panels = [*curves, *(_scatter(pairs, measure) for measure in shown)]
    return Figure(
        name="outputs-weights",
        title="Do experts with similar weights give similar outputs?",
        how_to_read="First Spearman's correlation over the pairs of experts of a layer, of how "
        "alike they are as matrices, a panel for each way to compare these, and of the mean cosine "
        "of their outputs; lines: 95% intervals over experts and documents together, dashed: "
        "chance. Then the pairs behind it, a dot each.",
        limits="Few experts make wide intervals. An expert that is like all others in both "
        "respects makes such a correlation too. Matched are at most as many experts of a layer as "
        "was asked for. A correlation does not say that weights are why outputs agree.",
        chart=alt.concat(*panels).resolve_scale(color="independent"),
        panels=Panels(count=len(panels), minimum=220, preferred=300, across=3),
    )


def _scatter(pairs: pd.DataFrame, measure: str) -> Layered:
    column = f"weights_{measure}"
    rows, _ = spread(pairs[pairs[column].notna()])
    order = rows["place"].unique().tolist()
    scale = alt.Scale(zero=False)
    few = alt.Axis(tickCount=4)
    dots = (
        alt.Chart(rows)
        .mark_circle(size=25, opacity=0.7)
        .encode(
            alt.X(f"{column}:Q", title=f"weights, {_WEIGHTS[measure]}", scale=scale, axis=few),
            alt.Y("later_cosine:Q", title="cosine of outputs", scale=scale),
            alt.Color("place:N", sort=order, title="layer", scale=alt.Scale(scheme="viridis")),
            tooltip=[
                label("place", "layer"),
                label("expert", "expert"),
                label("other_expert", "and expert"),
                tip(column, "weights"),
                tip("later_cosine", "cosine of outputs"),
            ],
        )
    )
    return alt.layer(dots).properties(height=190)
