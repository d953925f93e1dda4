"""How the panels of a chart share the width they are given.

`page/report.js` holds the same rule, so that a page fits the screen it is read on and a figure
on disk fits a printed page.
"""

from dataclasses import asdict, dataclass
from typing import Any

import altair as alt

FIGURE_WIDTH = 860
"""Width in pixels that figures on disk are laid out for."""


@dataclass(frozen=True, kw_only=True)
class Panels:
    """Number and widths of the panels of one chart, in pixels."""

    count: int = 1
    """How many panels there are."""
    minimum: int = 220
    """Least width of one plotting area; where there is less room, the chart scrolls."""
    preferred: int = 700
    """Greatest width of one plotting area."""
    across: int | None = None
    """Most columns; None for as many as there is room for."""
    beside: int = 60
    """Room for the axis labels and the gap next to a plotting area."""

    def layout(self, width: int) -> tuple[int, int]:
        """Columns, and width of one plotting area, in a box `width` pixels wide."""
        most = self.across or self.count
        columns = max(1, min(most, self.count, width // (self.minimum + self.beside)))
        return columns, max(self.minimum, min(self.preferred, width // columns - self.beside))


def specification(
    chart: alt.TopLevelMixin, panels: Panels, *, title: str, description: str
) -> dict[str, Any]:
    """The Vega-Lite specification of a chart, laid out for `FIGURE_WIDTH`.

    It holds its data and no address at all; `usermeta` tells the page how to lay it out anew.
    """
    with alt.data_transformers.enable("default", max_rows=None):
        spec = chart.to_dict()
    del spec["$schema"], spec["config"]  # the theme brings the configuration
    spec["datasets"] = {n: [_short(row) for row in rows] for n, rows in spec["datasets"].items()}
    spec["title"] = title
    spec["description"] = description
    spec["usermeta"] = {"panels": asdict(panels)}
    columns, width = panels.layout(FIGURE_WIDTH)
    if "concat" in spec:
        spec["columns"] = columns
        for view in spec["concat"]:
            view["width"] = width
    elif "facet" in spec:
        spec["columns"] = columns
        spec["spec"]["width"] = width
    else:
        spec["width"] = width
    return spec


def _short(row: dict[str, Any]) -> dict[str, Any]:
    """A row with four digits, more than a chart can show; the tables keep them all."""
    return {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in row.items()}
