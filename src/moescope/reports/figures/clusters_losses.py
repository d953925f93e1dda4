"""What smaller models lose, as dots with intervals: figures of `clusters` and `reroute`."""

from collections.abc import Sequence

import altair as alt
import pandas as pd

from moescope.reports.marks import Tooltips, label, tip
from moescope.reports.panels import Panels
from moescope.reports.registry import Figure

RISE = "rise of the loss (nats per token)"
_STEP = 0.003
"""Share of the parameters between two dots that would hide each other."""


def dots(
    table: pd.DataFrame,
    title: str,
    about: Tooltips,
    channels: Sequence[alt.SchemaBase],
) -> alt.LayerChart | alt.FacetChart:
    """Differences with their intervals, and a line at zero, around which the scale widens."""
    scale = alt.Scale(type="symlog", constant=0.1, nice=False, padding=8)
    base = alt.Chart(table)
    zero = base.mark_rule(style="reference", tooltip=None).encode(y=alt.datum(0))
    spread = base.mark_rule(opacity=0.6, tooltip=None).encode(
        alt.Y("difference_low:Q", scale=scale), alt.Y2("difference_high:Q"), *channels
    )
    tooltip = [
        *about,
        tip("difference", title),
        tip("difference_low", "from"),
        tip("difference_high", "to"),
        tip("n_tokens", "tokens", ","),
        tip("n_documents", "documents", ","),
    ]
    points = base.mark_point(filled=True, opacity=1, size=42).encode(
        alt.Y("difference:Q", title=title, scale=scale), *channels, tooltip=tooltip
    )
    return alt.layer(zero, spread, points)


def coloured(field: str, order: Sequence[str]) -> alt.Color:
    """A colour for each of these, in this order."""
    return alt.Color(
        field,
        type="nominal",
        title=None,
        scale=alt.Scale(domain=list(order), range="category"),
        legend=alt.Legend(columns=3, symbolType="circle", labelLimit=240),
    )


def shared(table: pd.DataFrame) -> Figure:
    """Loss against parameters."""
    rows = table[table["domain"] == "all"]
    order = rows["variant"].unique().tolist()
    place = rows["variant"].map(order.index) - (len(order) - 1) / 2
    x = alt.X(
        "shown:Q",
        title="parameters of experts, adapters and maps, against all experts",
        scale=alt.Scale(zero=False, padding=14),
        axis=alt.Axis(format=".0%", tickCount=8),
    )
    about = [
        label("variant", "variant"),
        tip("draw", "random choice", "d"),
        tip("kept", "clusters", "d"),
        tip("experts", "experts kept", "d"),
        tip("of_parameters", "parameters", ".1%"),
    ]
    frame = rows.assign(shown=rows["of_parameters"] + _STEP * place)
    chart = dots(frame, RISE, about, [x, coloured("variant", order)])
    return Figure(
        name="clusters-shared",
        title="What is lost when clusters share an expert?",
        how_to_read="A dot is a model in which every cluster keeps one expert, and the others are "
        "this one behind an adapter: across (what it takes to store), the rise of the loss on "
        "held-out documents up, with 95% intervals over documents; of random clusters one dot for "
        "each draw. Dots that take as much stand side by side. Merged: experts of a layer "
        "averaged (HC-SMoE), as many as the same parameters pay for. Linear maps and mean outputs "
        "take the place of the same experts, with no expert behind them. The scale widens around "
        "zero.",
        limits="Nothing was trained after sharing but the adapters, one by one, on the model as it "
        "is. Paired differences of the variants are in the table `against`.",
        chart=chart.properties(height=280),
        panels=Panels(minimum=340, preferred=700),
        table=rows,
    )
