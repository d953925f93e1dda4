"""Where the inputs and outputs of an alignment lie: histograms and principal components."""

import altair as alt
import pandas as pd

from moescope.reports.marks import label, tip
from moescope.reports.panels import Panels
from moescope.reports.registry import Figure


def histograms(distributions: pd.DataFrame) -> Figure:
    """Histograms of the inputs and outputs, each on its own axis."""
    frame = distributions.assign(
        heading=distributions["panel"]
        + "\n"
        + distributions.apply(lambda r: f"mean {r['mean']:.2g}, sd {r['std']:.2g}", axis=1)
    )
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
                label("panel", "panel"),
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
        "axes: compare the means and standard deviations written above.",
        limits="Equal histograms do not make equal inputs: directions matter, and they are not "
        "seen here.",
        chart=_by_heading(chart, order),
        panels=Panels(count=len(order), minimum=200, preferred=300),
    )


def principal_components(pca: pd.DataFrame) -> Figure:
    """The first two principal components of the inputs and outputs."""
    frame = pca.assign(
        heading=pca["panel"]
        + "\n"
        + pca.apply(
            lambda r: f"{r['explained1']:.0%} and {r['explained2']:.0%} of the variance", axis=1
        )
    )
    order = frame["heading"].unique().tolist()
    axis = alt.Axis(tickCount=4)
    chart = (
        alt.Chart(frame)
        .mark_circle(style="dot-quiet", size=16, opacity=1)
        .encode(
            alt.X("pc1:Q", title="first component", axis=axis),
            alt.Y("pc2:Q", title="second component", axis=axis),
            tooltip=[label("panel", "panel"), tip("pc1", "first"), tip("pc2", "second")],
        )
        .properties(height=180)
    )
    return Figure(
        name="align-pca",
        title="What shape do the inputs and outputs have?",
        how_to_read="One dot is one token, in the two directions of greatest variance of its "
        "panel; axes differ between panels.",
        limits="Two components hold only the stated part of the variance; far-off dots may be a "
        "few tokens that carry most of it.",
        chart=_by_heading(chart, order),
        panels=Panels(count=len(order), minimum=200, preferred=300),
    )


def _by_heading(chart: alt.Chart, order: list[str]) -> alt.FacetChart:
    """One panel per heading, whose two lines stand above it, each with its own axes."""
    header = alt.Header(title=None, labelExpr="split(datum.label, '\\n')")
    facet = alt.Facet("heading:N", sort=order, header=header)
    spacing = {"row": 90, "column": 58}
    panels: alt.FacetChart = chart.facet(
        facet=facet, bounds="flush", spacing=spacing
    ).resolve_scale(x="independent", y="independent")
    return panels
