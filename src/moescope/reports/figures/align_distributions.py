"""Where the inputs and outputs of an alignment lie: histograms and principal components."""

import altair as alt
import pandas as pd

from moescope.reports.marks import facet_by_heading, tip
from moescope.reports.panels import Panels
from moescope.reports.registry import Figure

_MOST_PANELS = 9
_MOST_DOTS = 600


def histograms(distributions: pd.DataFrame) -> Figure:
    """Histograms of the inputs and outputs, each on its own axis."""
    shown, which = _first_panels(distributions)
    frame = shown.assign(
        heading=shown["panel"]
        + "\n"
        + shown.apply(lambda r: f"mean {r['mean']:.2g}, sd {r['std']:.2g}", axis=1)
    )
    frame = frame[["heading", "bin_left", "bin_right", "density"]]
    order = frame["heading"].unique().tolist()
    few = alt.Axis(tickCount=4, grid=False)
    chart = (
        alt.Chart(frame)
        .mark_bar(style="bar-quiet", binSpacing=0)
        .encode(
            alt.X("bin_left:Q", bin="binned", title="value of one dimension", axis=few),
            alt.X2("bin_right"),
            alt.Y("density:Q", title="density", axis=few),
            tooltip=[
                tip("bin_left", "from", ".3~g"),
                tip("bin_right", "to", ".3~g"),
                tip("density", "density", ".3~g"),
            ],
        )
        .properties(height=130)
    )
    return Figure(
        name="align-distributions",
        title="Do the inputs and outputs live on the same scale?",
        how_to_read="Each panel is a histogram over all tokens and dimensions, with its own "
        f"axes: compare the means and standard deviations written above.{which}",
        limits="Equal histograms do not make equal inputs: directions matter, and they are not "
        "seen here.",
        chart=facet_by_heading(chart, order),
        panels=Panels(count=len(order), minimum=200, preferred=300),
    )


def principal_components(pca: pd.DataFrame) -> Figure:
    """The first two principal components of the inputs and outputs."""
    shown, which = _first_panels(pca)
    shown = shown.groupby("panel", sort=False).head(_MOST_DOTS // shown["panel"].nunique())
    frame = shown.assign(
        heading=shown["panel"]
        + "\n"
        + shown.apply(
            lambda r: f"{r['explained1']:.0%} and {r['explained2']:.0%} of the variance", axis=1
        )
    )
    frame = frame[["heading", "pc1", "pc2"]]
    order = frame["heading"].unique().tolist()
    axis = alt.Axis(tickCount=4)
    chart = (
        alt.Chart(frame)
        .mark_circle(style="dot-quiet", size=16, opacity=1)
        .encode(
            alt.X("pc1:Q", title="first component", axis=axis),
            alt.Y("pc2:Q", title="second component", axis=axis),
            tooltip=[tip("pc1", "first"), tip("pc2", "second")],
        )
        .properties(height=180)
    )
    return Figure(
        name="align-pca",
        title="What shape do the inputs and outputs have?",
        how_to_read="One dot is one token, in the two directions of greatest variance of its "
        f"panel; axes differ between panels.{which}",
        limits="Two components hold only the stated part of the variance; far-off dots may be a "
        "few tokens that carry most of it.",
        chart=facet_by_heading(chart, order),
        panels=Panels(count=len(order), minimum=200, preferred=300),
    )


def _first_panels(frame: pd.DataFrame) -> tuple[pd.DataFrame, str]:
    """The rows of as many panels as fit, and words for the others."""
    panels = frame["panel"].unique()
    left = len(panels) - _MOST_PANELS
    which = f" {left} further panels are in the table." if left > 0 else ""
    return frame[frame["panel"].isin(panels[:_MOST_PANELS])], which
