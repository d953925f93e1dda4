"""Figures of `routing`: how much of the work the busiest experts take, domain by domain."""

from collections.abc import Iterable

import altair as alt
import numpy as np
import pandas as pd

from moescope.reports.marks import label, tip
from moescope.reports.panels import Panels
from moescope.reports.registry import Figure

MOST_LAYERS = 6


def spread(layers: Iterable[int], most: int = MOST_LAYERS) -> list[int]:
    """At most so many layers, evenly from the first to the last."""
    found = sorted(set(layers))
    chosen = np.linspace(0, len(found) - 1, min(most, len(found))).round().astype(int)
    return [found[i] for i in chosen]


def left_out(frame: pd.DataFrame, shown: list[int]) -> str:
    """What to add to the text where not all layers are drawn."""
    missing = frame["layer"].nunique() - len(shown)
    return f" {missing} layers are in the table alone." if missing else ""


def by_layer(
    chart: alt.Chart | alt.LayerChart | alt.FacetChart, order: list[str]
) -> alt.FacetChart:
    """One panel per `heading`, side by side."""
    panels: alt.FacetChart = chart.facet(
        facet=alt.Facet("heading:N", sort=order, header=alt.Header(title=None))
    ).resolve_axis(x="independent")
    return panels


def ranked_experts(shares: pd.DataFrame) -> Figure:
    """The published plot: share of every expert, most used first, against K/E."""
    layers = spread(shares["layer"])
    frame = shares[(shares["domain"] != "all") & shares["layer"].isin(layers)]
    frame = frame.assign(heading="layer " + frame["layer"].astype(str))
    ranks = frame.groupby(["layer", "domain"])["share"].rank(ascending=False, method="first")
    frame = frame.assign(rank=ranks.astype(int))
    x = alt.X("rank:Q", title="experts, most used first", axis=alt.Axis(format="d", tickMinStep=1))
    y = alt.Y("share:Q", title="share of tokens", axis=alt.Axis(format="%"))
    base = alt.Chart(frame)
    even = base.mark_line(style="reference", tooltip=None).encode(x, alt.Y("uniform:Q"))
    lines = base.mark_line(point=alt.OverlayMarkDef(size=18)).encode(
        x,
        y,
        _domains(frame),
        tooltip=[
            label("domain", "domain"),
            label("layer", "layer"),
            label("expert", "expert"),
            tip("share", "share of tokens", ".1%"),
            tip("low", "95% interval, from", ".1%"),
            tip("high", "to", ".1%"),
            tip("uniform", "K/E", ".1%"),
        ],
    )
    return Figure(
        name="routing-experts",
        title="How many experts does each kind of text prefer?",
        how_to_read="Every expert of a layer by the share of tokens that have it in their top-k, "
        "in each domain from the most used to the least; the dashed line is K/E, an even load. "
        "The steeper a line, the fewer experts do the work." + left_out(shares, layers),
        limits="Ranks are each domain's own: experts above one another need not be the same. "
        "Sorting alone makes any line fall, the more the fewer the tokens.",
        chart=by_layer(
            alt.layer(even, lines).properties(height=150),
            [f"layer {layer}" for layer in layers],
        ),
        panels=Panels(count=len(layers), minimum=220, preferred=400),
    )


def half(concentration: pd.DataFrame) -> Figure:
    """The published coverage of 50%, and the share of the K busiest."""
    frame = concentration[(concentration["domain"] != "all") & (concentration["n_tokens"] > 0)]
    frame = frame.assign(half=np.ceil(frame["num_experts"] / 2))
    domains = _domains(frame)
    return Figure(
        name="routing-half",
        title="How few experts take half of the routing?",
        how_to_read="Left (or above): the least number of experts that take half of the routing of "
        "a domain; dashed, with an even load. Right: the part that goes to the K busiest experts, "
        "with its 95% interval over documents (none under 30); dashed, K/E.",
        limits="Which experts these are differs by domain and layer. The busiest of a small "
        "sample look busier than they are.",
        chart=alt.concat(
            _by_domain(frame, domains, "experts_for_half", "half", "number of experts", "d"),
            _by_domain(frame, domains, "busiest_k_share", "uniform", "part of the routing", ".0%"),
        ),
        panels=Panels(count=2, minimum=230, preferred=400),
    )


def _by_domain(
    frame: pd.DataFrame, domains: alt.Color, value: str, even: str, title: str, number: str
) -> alt.LayerChart | alt.FacetChart:
    x = alt.X("layer:O", title="layer")
    scale = alt.Scale(zero=True)
    axis = alt.Axis(format=number, tickMinStep=1 if number == "d" else 0)
    base = alt.Chart(frame)
    dashed = base.mark_line(style="reference", tooltip=None).encode(x, alt.Y(f"{even}:Q"))
    lines = base.mark_line(point=alt.OverlayMarkDef(size=24)).encode(
        x,
        alt.Y(f"{value}:Q", title=title, scale=scale, axis=axis),
        domains,
        tooltip=[
            label("domain", "domain"),
            label("layer", "layer"),
            tip("experts_for_half", "experts for half", "d"),
            tip("busiest_k_share", "part of the K busiest", ".1%"),
            tip("busiest_k_low", "95% interval, from", ".1%"),
            tip("busiest_k_high", "to", ".1%"),
            tip("entropy_bits", "entropy (bits)"),
            tip("n_tokens", "tokens", ","),
            tip("n_documents", "documents", ","),
        ],
    )
    layers = [lines, dashed]
    if value == "busiest_k_share":
        layers.append(
            base.mark_rule(opacity=0.45, tooltip=None).encode(
                x, alt.Y("busiest_k_low:Q"), alt.Y2("busiest_k_high:Q"), domains
            )
        )
    return alt.layer(*layers).properties(height=200)


def _domains(frame: pd.DataFrame) -> alt.Color:
    order = frame["domain"].unique().tolist()
    return alt.Color("domain:N", title=None, scale=alt.Scale(domain=order, range="category"))
