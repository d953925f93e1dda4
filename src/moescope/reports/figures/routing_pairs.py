"""Figures of `routing`: experts that share tokens, within a layer and from one to the next."""

import altair as alt
import numpy as np
import pandas as pd

from moescope.reports.figures.routing_concentration import left_out, spread
from moescope.reports.marks import MISSING, diverging, label, matrix, tip
from moescope.reports.panels import Panels
from moescope.reports.registry import Figure

_MOST_EXPERTS = 40
_MOST_CELLS = 6_000
_TIMES = "{'-2': '1/4', '-1': '1/2', '0': 'chance', '1': '2x', '2': '4x'}[datum.value]"


def coactivation(pairs: pd.DataFrame) -> Figure:
    """Lift of every pair of experts of a layer."""
    chart, panels, omitted = _heat_map(pairs, "other", "expert", "expert")
    return Figure(
        name="routing-coactivation",
        title="Which experts work on the same tokens?",
        how_to_read="One cell is a pair of experts of one layer. Blue: more tokens have both than "
        "if experts chose their company by frequency alone (quasi-independence: no expert "
        f"twice); orange: fewer; {MISSING}." + omitted,
        limits="Experts of the same kind of text come together because of the text, whatever they "
        "do. Where a router chooses groups of experts first, the groups show.",
        chart=chart,
        panels=panels,
    )


def transitions(pairs: pd.DataFrame) -> Figure:
    """Lift of every expert of the next layer, by that of this one."""
    chart, panels, omitted = _heat_map(pairs, "next_expert", "expert of the next layer", "expert")
    return Figure(
        name="routing-transitions",
        title="Where do the tokens of an expert go in the next layer?",
        how_to_read="One cell is an expert of a layer (row) and one of the next recorded layer "
        "(column). Blue: the tokens of the one go to the other more often than all tokens do; "
        f"orange: less often; {MISSING}." + omitted,
        limits="The same token takes both choices, so that both may follow from what it is: a "
        "path through experts is no proof that the one passes anything to the other.",
        chart=chart,
        panels=panels,
    )


def _heat_map(
    pairs: pd.DataFrame, other: str, x_title: str, y_title: str
) -> tuple[alt.FacetChart, Panels, str]:
    busiest = pairs.groupby("expert")["n_tokens"].sum().nlargest(_MOST_EXPERTS).index
    columns = pairs.groupby(other)["tokens"].sum().nlargest(_MOST_EXPERTS).index
    cells = len(busiest) * len(columns)
    layers = spread(pairs["layer"], max(1, min(6, _MOST_CELLS // cells)))
    chosen = pairs["expert"].isin(busiest) & pairs[other].isin(columns)
    frame = pairs[chosen & pairs["layer"].isin(layers)]
    frame = frame.assign(
        log_lift=np.log2(frame["lift"].clip(lower=2.0**-6)),
        heading="layer " + frame["layer"].astype(str),
    )
    if "next_layer" in frame:
        frame["heading"] += " to " + frame["next_layer"].astype(str)
    tooltip = [
        label("layer", "layer"),
        label("expert", y_title),
        label(other, x_title),
        tip("share", "of the tokens of the first", ".1%"),
        tip("expected", "by chance", ".1%"),
        tip("lift", "times as often"),
        tip("low", "95% interval, from"),
        tip("high", "to"),
        tip("tokens", "tokens", ","),
    ]
    order = frame["heading"].unique().tolist()
    layers_of_marks = matrix(
        alt.X(f"{other}:O", title=x_title),
        alt.Y("expert:O", title=y_title),
        "log_lift",
        diverging("log_lift", "tokens of both, against chance", 2.0, _TIMES),
        tooltip,
    )
    size = max(8, min(20, 520 // len(busiest)))
    chart = (
        alt.layer(*layers_of_marks, data=frame)
        .properties(height=alt.Step(size))
        .facet(facet=alt.Facet("heading:N", sort=order, header=alt.Header(title=None)))
        .resolve_axis(x="independent")
    )
    omitted = left_out(pairs, layers)
    if pairs["expert"].nunique() > len(busiest):
        omitted += f" The {len(busiest)} busiest experts are drawn."
    least = max(180, size * len(columns))
    return chart, Panels(count=len(order), minimum=least, preferred=max(220, least)), omitted
