"""An alignment by pair of layers: where along the depth anything is alike."""

import altair as alt
import pandas as pd

from moescope.reports.figures.align_pairs import CURVES, gaps, layer_pairs
from moescope.reports.marks import label, tip
from moescope.reports.panels import Panels
from moescope.reports.registry import Figure

_SHAPES = ["circle", "square", "diamond", "triangle-up"]


def layers(pairs: pd.DataFrame) -> Figure:
    """Median errors and the spread of the scores, by pair of layers."""
    scored = pairs[pairs["score"].notna()]
    order = [str(frame["layers"].iloc[0]) for _, frame in layer_pairs(pairs)]
    axis = alt.Axis(labelAngle=-45 if len(order) > 8 else 0)
    x = alt.X("layers:N", title="pair of layers", sort=order, axis=axis)
    return Figure(
        name="align-layers",
        title="Between which layers does anything stand out from the controls?",
        how_to_read="Left (or above): medians over the pairs of experts of two layers; the experts "
        "help where the round marks lie below all others but the ceiling. Right: the scores of the "
        "same pairs of experts, their whole range, the middle half as a bar and the median as a "
        "mark; the dashed line is what the controls reach.",
        limits="Medians hide single pairs that stand out, and the pairs of one layer share their "
        "tokens and controls: they are not independent." + gaps(pairs),
        chart=alt.concat(_medians(scored, x), _scores(scored, x)),
        panels=Panels(count=2, minimum=230, preferred=max(380, 30 * len(order))),
    )


def _medians(scored: pd.DataFrame, x: alt.X) -> alt.Chart:
    medians = scored.groupby("layers", sort=False)[list(CURVES)].median().reset_index()
    long = medians.melt("layers", list(CURVES), "curve", "value").replace({"curve": CURVES})
    names = list(CURVES.values())
    key = alt.Legend(title=None, columns=2)
    chart: alt.Chart = (
        alt.Chart(long)
        .mark_line(point=alt.OverlayMarkDef(size=52))
        .encode(
            x,
            alt.Y("value:Q", title="held-out FVU, median", scale=alt.Scale(zero=True)),
            alt.Color("curve:N", scale=alt.Scale(domain=names, range="category"), legend=key),
            alt.Shape("curve:N", scale=alt.Scale(domain=names, range=_SHAPES), legend=key),
            tooltip=[
                label("layers", "pair of layers"),
                label("curve", "curve"),
                tip("value", "FVU"),
            ],
        )
        .properties(height=230)
    )
    return chart


def _scores(scored: pd.DataFrame, x: alt.X) -> alt.LayerChart | alt.FacetChart:
    spread = scored.groupby("layers", sort=False)["score"].describe()
    names = {"25%": "quarter", "50%": "median", "75%": "three_quarters"}
    spread = spread.rename(columns=names).drop(columns=["mean", "std"]).reset_index()
    base = alt.Chart(spread)
    tooltip = [
        label("layers", "pair of layers"),
        tip("min", "least score"),
        tip("median", "median"),
        tip("max", "largest"),
        tip("count", "pairs of experts", ","),
    ]
    zero = alt.Chart(pd.DataFrame({"value": [0.0]})).mark_rule(style="reference", tooltip=None)
    return alt.layer(
        zero.encode(alt.Y("value:Q", title="score")),
        base.mark_rule(tooltip=None).encode(x, alt.Y("min:Q"), alt.Y2("max")),
        base.mark_bar(style="bar-quiet", size=10).encode(
            x, alt.Y("quarter:Q"), alt.Y2("three_quarters"), tooltip=tooltip
        ),
        base.mark_tick(size=18, thickness=2).encode(x, alt.Y("median:Q"), tooltip=tooltip),
    ).properties(height=230)
