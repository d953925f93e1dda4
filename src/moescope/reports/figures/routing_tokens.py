"""Figures of `routing`: tokens typical for an expert, and router logits by domain."""

import math

import altair as alt
import pandas as pd

from moescope.reports.figures.routing_concentration import by_layer, left_out, spread
from moescope.reports.marks import label, tip
from moescope.reports.panels import Panels
from moescope.reports.registry import Figure

_MOST_EXPERTS = 16
_MOST_LETTERS = 12
_DARK = 0.6
_MOST_POINTS = 50


def typical(tokens: pd.DataFrame) -> Figure:
    """The most typical tokens of each expert, as text in cells."""
    layers = spread(tokens["layer"], 4)
    frame = tokens[tokens["layer"].isin(layers)]
    experts = spread(frame["expert"], _MOST_EXPERTS)
    frame = frame[frame["expert"].isin(experts)]
    frame = frame.assign(
        heading="layer " + frame["layer"].astype(str),
        short=frame["token"].str.slice(0, _MOST_LETTERS),
        dark=frame["share"] > _DARK,
    )
    x, y = alt.X("rank:O", title="most typical first"), alt.Y("expert:O", title="expert")
    scale = alt.Scale(domain=[0, 1], range="ramp", interpolate="rgb")
    legend = alt.Legend(format="%", values=[0, 0.5, 1])
    base = alt.Chart(frame)
    cells = base.mark_rect().encode(
        x,
        y,
        alt.Color("share:Q", title="its places that have the expert", scale=scale, legend=legend),
        tooltip=[
            label("token", "token"),
            label("expert", "expert"),
            tip("share", "its places that have the expert", ".1%"),
            tip("lift", "times the share of all tokens"),
            tip("n_tokens", "places", ","),
            label("context_1", "for instance"),
            label("context_2", "or"),
        ],
    )
    weak = base.transform_filter("!datum.dark").mark_text(style="number", tooltip=None)
    strong = base.transform_filter("datum.dark").mark_text(style="number-strong", tooltip=None)
    chart = alt.layer(
        cells, weak.encode(x, y, alt.Text("short:N")), strong.encode(x, y, alt.Text("short:N"))
    )
    omitted = left_out(tokens, layers)
    if tokens["expert"].nunique() > len(experts):
        omitted += f" {len(experts)} experts of each are drawn."
    first = tokens[tokens["rank"] == 1]
    columns = ["layer", "expert", "token", "share", "lift", "n_tokens", "context_1", "context_2"]
    return Figure(
        name="routing-tokens",
        title="Which tokens go to an expert most surely?",
        how_to_read="One cell is a token of the vocabulary, in quotes; the darker, the larger the "
        "part of its places in the text that have the expert of the row in their top-k. Ranked by "
        "the lower limit of that part, so that rare tokens need a larger one. Places are in the "
        "tooltip and, for the first of each expert, in the table below." + omitted,
        limits="The best of thousands on the same text: on other text they will look less sure. A "
        "typical token need not make up much of what the expert does.",
        chart=by_layer(chart.properties(height=alt.Step(22)), _headings(layers)),
        panels=Panels(count=len(layers), minimum=360, preferred=420, across=2),
        table=first[columns].reset_index(drop=True),
    )


def components(points: pd.DataFrame, logits: pd.DataFrame, domains: list[str]) -> Figure:
    """Router logits of a sample of tokens on their first two principal components."""
    layers = spread(points["layer"])
    largest = int(points.groupby(["layer", "domain"]).size().max())
    step = math.ceil(largest / _MOST_POINTS)
    number = points.groupby(["layer", "domain"]).cumcount()
    frame = points[points["layer"].isin(layers) & (number % step == 0)]
    between = logits.set_index("layer")["between_domains"]
    names = {la: f"layer {la}: {between[la]:.0%} between domains" for la in layers}
    frame = frame.assign(heading=frame["layer"].map(names))
    colours = alt.Scale(domain=domains, range="category")
    chart = (
        alt.Chart(frame)
        .mark_circle(size=14, opacity=0.6)
        .encode(
            alt.X("pc1:Q", title="first component"),
            alt.Y("pc2:Q", title="second component"),
            alt.Color("domain:N", title=None, scale=colours),
            tooltip=[label("domain", "domain"), label("layer", "layer"), label("token", "token")],
        )
        .properties(height=220)
    )
    explained = (logits["pc1_variance"] + logits["pc2_variance"])[logits["layer"].isin(layers)]
    return Figure(
        name="routing-logits",
        title="Do router logits lie apart by domain?",
        how_to_read="One dot is a token drawn at random, as many of each domain (at most "
        f"{_MOST_POINTS} are drawn; the sample is larger); its place is "
        "that of its router logits on the two directions of the largest variance, which hold "
        f"{explained.min():.0%} to {explained.max():.0%} of it. Above each panel: the part of the "
        "whole variance that lies between the means of domains." + left_out(points, layers),
        limits="Dots of one document are not independent, and two directions do not show all: the "
        "table of logits tests the whole against shuffled documents.",
        chart=by_layer(chart, list(names.values())).resolve_scale(x="independent", y="independent"),
        panels=Panels(count=len(layers), minimum=220, preferred=400, beside=72),
    )


def _headings(layers: list[int]) -> list[str]:
    return [f"layer {layer}" for layer in layers]
