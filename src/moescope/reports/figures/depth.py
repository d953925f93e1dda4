"""Figures of the analysis `depth`: every measure of layers over depth."""

import altair as alt

from moescope.reports.marks import facet_by_heading, label, measure_headings, tip
from moescope.reports.panels import Panels
from moescope.reports.registry import Figure, figures
from moescope.runs import Result

COLUMNS = {
    "analysis, measure": "Where the measure comes from, and what it is.",
    "stack, layer": "Decoder or encoder, and the model's own layer number.",
    "value": "The measure in that layer.",
    "low, high": "Its 95% interval, where the analysis gives one.",
    "last": "Whether it is the last layer of its stack.",
    "first": "Value of the first layer; in the table of trends.",
    "tau": "Kendall's tau between layer and value: 1 rises throughout, -1 falls throughout.",
    "p_value": "Of tau, over all orders of the layers, two-sided.",
    "p_corrected": "The same after Holm's correction over all curves.",
    "tau_without_last": "Tau of all layers but the last.",
    "last_outside": "Whether the last value lies beyond all the others.",
}

_OTHERS, _LAST = "other layers", "last layer"
_COLOURS = alt.Scale(domain=[_OTHERS, _LAST], range="category")
_SHAPES = alt.Scale(domain=[_OTHERS, _LAST], range=["circle", "diamond"])


@figures(
    "depth",
    title="By depth",
    question="Which measures rise or fall from the first layer to the last?",
    columns=COLUMNS,
)
def draw(result: Result) -> list[Figure]:
    """All curves on one page."""
    table = result.table
    places = table["last"].map({True: _LAST, False: _OTHERS})
    frame = table.assign(heading=measure_headings(table), place=places)
    order = frame["heading"].unique().tolist()
    x = alt.X("layer:O", title="layer")
    scale = alt.Scale(zero=False)
    spread = (
        alt.Chart()
        .mark_rule(opacity=0.6, tooltip=None)
        .encode(x, alt.Y("low:Q", scale=scale), alt.Y2("high:Q"))
    )
    lines = alt.Chart().mark_line(tooltip=None).encode(x, alt.Y("value:Q", scale=scale))
    points = (
        alt.Chart()
        .mark_point(filled=True, opacity=1, size=50)
        .encode(
            x,
            alt.Y("value:Q", title=None, scale=scale),
            alt.Color("place:N", title=None, scale=_COLOURS, legend=alt.Legend(symbolOpacity=1)),
            alt.Shape("place:N", title=None, scale=_SHAPES),
            tooltip=[
                label("measure", "measure"),
                label("stack", "stack"),
                label("layer", "layer"),
                tip("value", "value"),
                tip("low", "95% interval, from"),
                tip("high", "to"),
                tip("n_tokens", "tokens", ","),
                tip("n_documents", "documents", ","),
            ],
        )
    )
    layers = frame["layer"].nunique()
    return [
        Figure(
            name="depth-curves",
            title="What changes from the first layer to the last?",
            how_to_read="One panel per measure, each with its own scale: its value by layer, with "
            "the 95% interval where the analysis gives one. The last layer is marked: it feeds the "
            "prediction directly and often stands apart. The table of trends says which curves "
            "rise or fall beyond chance.",
            limits="Scales start where the values do, so a steep line need not be a large change. "
            "Intervals are over documents of one model; another training may bend other curves.",
            chart=facet_by_heading(
                alt.layer(spread, lines, points, data=frame).properties(height=130), order
            ),
            panels=Panels(count=len(order), minimum=max(200, 14 * layers), preferred=300, across=3),
        )
    ]
