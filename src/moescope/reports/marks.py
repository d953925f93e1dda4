"""Marks that several figures share: matrices, cells without a number, colour scales.

Colours are named here and defined in `page/theme.json`, once for light and once for dark.
"""

import math
from collections.abc import Sequence

import altair as alt
import pandas as pd

MISSING = "hatched: no number, for the reason in the tooltip"

Tooltips = Sequence[alt.Tooltip]


def tip(field: str, title: str, number: str = ".3~f") -> alt.Tooltip:
    """A quantity in a tooltip, as `number` formats it."""
    return alt.Tooltip(field, type="quantitative", title=title, format=number)


def label(field: str, title: str) -> alt.Tooltip:
    """A name or a status in a tooltip."""
    return alt.Tooltip(field, type="nominal", title=title)


def diverging(field: str, title: str, reach: float, label_expr: str = "datum.label") -> alt.Color:
    """A colour whose middle is zero and whose ends lie `reach` away; beyond it, it stays."""
    ticks = [-reach, -reach / 2, 0, reach / 2, reach]
    return alt.Color(
        field,
        type="quantitative",
        title=title,
        scale=alt.Scale(domain=[-reach, reach], range="diverging", clamp=True, interpolate="rgb"),
        legend=alt.Legend(labelExpr=label_expr, values=ticks, format=".1f"),
    )


def logarithmic(values: pd.Series, title: str, name: str) -> alt.Color:
    """A one-way colour over the logarithm of positive values."""
    present = values[values > 0]
    low, high = (present.min(), present.max()) if len(present) else (0.1, 1.0)
    domain = [low, max(high, low * 1.01)]
    scale = alt.Scale(type="log", domain=domain, range="ramp", interpolate="rgb")
    legend = alt.Legend(values=[low, math.sqrt(low * high), high], format=".2r")
    return alt.Color(name, type="quantitative", title=title, scale=scale, legend=legend)


def matrix(x: alt.X, y: alt.Y, value: str, colour: alt.Color, tooltip: Tooltips) -> list[alt.Chart]:
    """Layers of a heat map; a cell whose `value` is missing is hatched."""
    present, absent = f"isValid(datum['{value}'])", f"!isValid(datum['{value}'])"
    cells = alt.Chart().transform_filter(present).mark_rect().encode(x, y, colour, tooltip=tooltip)
    gaps = alt.Chart().transform_filter(absent)
    blank = gaps.mark_rect(style="missing").encode(x, y, tooltip=tooltip)
    return [cells, blank, *(_diagonal(gaps, x, y, *ends) for ends in _DIAGONALS)]


_DIAGONALS = ((0.0, 0.5, 0.5, 0.0), (0.0, 1.0, 1.0, 0.0), (0.5, 1.0, 1.0, 0.5))
"""Ends (x, y, x2, y2) of the hatching, as parts of a cell."""


def _diagonal(
    base: alt.Chart, x: alt.X, y: alt.Y, left: float, bottom: float, right: float, top: float
) -> alt.Chart:
    ends: alt.Chart = base.mark_rule(style="hatch", tooltip=None).encode(
        x.bandPosition(left),
        y.bandPosition(bottom),
        alt.X2(x["shorthand"], bandPosition=right),
        alt.Y2(y["shorthand"], bandPosition=top),
    )
    return ends


def cell_numbers(x: alt.X, y: alt.Y, value: str, number: str, strong: str) -> list[alt.Chart]:
    """Layers that write `value` into its cell, in a second ink where the flag `strong` is set."""
    present = f"isValid(datum['{value}'])"
    text = alt.Text(value, type="quantitative", format=number)
    base = alt.Chart().transform_filter(present)
    weak = base.transform_filter(f"!datum['{strong}']").mark_text(style="number", tooltip=None)
    loud = base.transform_filter(f"datum['{strong}']").mark_text(
        style="number-strong", tooltip=None
    )
    return [weak.encode(x, y, text), loud.encode(x, y, text)]


def facet_by_heading(
    chart: alt.Chart | alt.LayerChart | alt.FacetChart, order: Sequence[str]
) -> alt.FacetChart:
    """One panel per `heading`, whose lines stand above it, each with its own axes."""
    header = alt.Header(title=None, labelExpr="split(datum.label, '\\n')")
    facet = alt.Facet("heading:N", sort=list(order), header=header)
    lines = 1 + max((heading.count("\n") for heading in order), default=0)
    panels: alt.FacetChart = chart.facet(
        facet=facet, bounds="flush", spacing={"row": 60 + 15 * lines, "column": 58}
    ).resolve_scale(x="independent", y="independent")
    return panels


def measure_headings(table: pd.DataFrame) -> pd.Series:
    """Headings of curves: analysis and measure, and the stack where there are two."""
    headings = table["analysis"] + "\n" + table["measure"]
    return headings + ", " + table["stack"] if len(set(table["stack"])) > 1 else headings
