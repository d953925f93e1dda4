"""Figures of `moescope compare`: the measures of several runs side by side."""

import altair as alt
import pandas as pd

from moescope.reports.marks import facet_by_heading, label, measure_headings, tip
from moescope.reports.panels import Panels
from moescope.reports.registry import Figure, figures
from moescope.runs import Result

COLUMNS = {
    "run": "Name of the run folder, in the order given.",
    "analysis, measure": "Where the measure comes from, and what it is.",
    "stack, layer": "Decoder or encoder; the model's own layer number, or mean, over all layers.",
    "position": "0 at the first of the layers, 1 at the last.",
    "value": "The measure.",
    "low, high": "Its 95% interval, where the analysis gives one; of a mean, the mean limits.",
    "difference": "From the first run, in the same layer or in the means.",
    "difference_low, difference_high": "Its 95% interval, as if both runs erred independently: too "
    "wide where they read the same text.",
}
_MEAN = "mean"
_TOOLTIP = [
    label("run", "run"),
    label("measure", "measure"),
    label("stack", "stack"),
    label("layer", "layer"),
    tip("value", "value"),
    tip("low", "95% interval, from"),
    tip("high", "to"),
    tip("difference", "from the first run"),
    tip("difference_low", "95% interval, from"),
    tip("difference_high", "to"),
]


@figures(
    "compare",
    title="Runs side by side",
    question="What differs between these models, by more than chance?",
    columns=COLUMNS,
)
def draw(result: Result) -> list[Figure]:
    """Means over layers by run, and every layer."""
    table = result.table
    frame = table.assign(heading=measure_headings(table))
    average = frame["layer"] == _MEAN
    return [_means(frame[average]), _layers(frame[~average])]


def _means(frame: pd.DataFrame) -> Figure:
    runs = frame["run"].unique().tolist()
    order = frame["heading"].unique().tolist()
    x = alt.X(
        "run:N",
        sort=runs,
        title=None,
        axis=alt.Axis(labelAngle=-30, labelLimit=90, labelOverlap=False),
    )
    scale = alt.Scale(zero=False)
    spread = (
        alt.Chart()
        .mark_rule(opacity=0.6, tooltip=None)
        .encode(x, alt.Y("low:Q", scale=scale), alt.Y2("high:Q"))
    )
    points = (
        alt.Chart()
        .mark_line(point=alt.OverlayMarkDef(size=44))
        .encode(x, alt.Y("value:Q", title=None, scale=scale), tooltip=_TOOLTIP)
    )
    return Figure(
        name="compare-means",
        title="What differs between the runs?",
        how_to_read="One panel per measure, each with its own scale: its mean over the layers, run "
        "by run in the order given, with its 95% interval where the analysis gives one. The line "
        "joins neighbours of that order; it means a course only where the order is one, such as "
        "checkpoints of a training.",
        limits="Each run is one model from one training: intervals are over documents (of "
        "`weights`, over experts) and say nothing about what another seed would give. Models of "
        "different depth are compared by their means alone.",
        chart=facet_by_heading(alt.layer(spread, points, data=frame).properties(height=130), order),
        panels=Panels(count=len(order), minimum=max(200, 34 * len(runs)), preferred=300, across=3),
    )


def _layers(frame: pd.DataFrame) -> Figure:
    runs = frame["run"].unique().tolist()
    order = frame["heading"].unique().tolist()
    x = alt.X("position:Q", title="depth, first to last layer")
    scale = alt.Scale(zero=False)
    colour = alt.Color(
        "run:N",
        title=None,
        scale=alt.Scale(domain=runs, range="category"),
        legend=alt.Legend(columns=5, symbolType="circle", symbolOpacity=1),
    )
    spread = (
        alt.Chart()
        .mark_rule(opacity=0.5, tooltip=None)
        .encode(x, alt.Y("low:Q", scale=scale), alt.Y2("high:Q"), colour)
    )
    lines = (
        alt.Chart()
        .mark_line(point=alt.OverlayMarkDef(size=30))
        .encode(x, alt.Y("value:Q", title=None, scale=scale), colour, tooltip=_TOOLTIP)
    )
    return Figure(
        name="compare-layers",
        title="And layer by layer?",
        how_to_read="The same measures by depth: 0 is the first of the layers with experts and 1 "
        "the last, so that models of different depth share an axis. Colours are runs.",
        limits="That two models agree at one depth does not mean that these layers do the same.",
        chart=facet_by_heading(alt.layer(spread, lines, data=frame).properties(height=130), order),
        panels=Panels(count=len(order), minimum=210, preferred=300, across=3),
    )
