"""Parts of the figures of `outputs`: curves over layers, and which layers are drawn."""

import altair as alt
import numpy as np
import pandas as pd

from moescope.reports.figures.weights_matrices import Layered
from moescope.reports.marks import label, tip

_MOST_PANELS = 12
_MOST_CELLS = 20_000


def by_layer(
    rows: pd.DataFrame, colour: alt.Color, title: str, level: float, name: alt.Tooltip
) -> Layered:
    """Lines over layers with intervals, and a dashed line at what chance gives."""
    order = rows["place"].unique().tolist()
    x = alt.X("place:N", sort=order, title="layer")
    scale = alt.Scale(zero=False)
    base = alt.Chart(rows)
    chance = alt.Chart(pd.DataFrame({"level": [level]}))
    tooltip = [
        label("place", "layer"),
        name,
        tip("value", title),
        tip("value_low", "95% interval, from"),
        tip("value_high", "to"),
        tip("n_tokens", "tokens", ","),
        tip("n_documents", "documents", ","),
    ]
    y = alt.Y("value:Q", title=title, scale=scale)
    return alt.layer(
        chance.mark_rule(style="reference", tooltip=None).encode(alt.Y("level:Q", scale=scale)),
        base.mark_rule(opacity=0.6, tooltip=None).encode(
            x, alt.Y("value_low:Q", scale=scale), alt.Y2("value_high:Q"), colour
        ),
        base.mark_line(point=alt.OverlayMarkDef(size=30)).encode(x, y, colour, tooltip=tooltip),
    ).properties(height=190)


def series(rows: pd.DataFrame) -> alt.Color:
    """A colour for each name in the column `series`."""
    names = rows["series"].unique().tolist()
    legend = alt.Legend(columns=2, symbolType="circle") if len(names) > 1 else None
    scale = alt.Scale(domain=names, range="category")
    return alt.Color("series:N", title=None, sort=None, scale=scale, legend=legend)


def spread(rows: pd.DataFrame) -> tuple[pd.DataFrame, str]:
    """Layers spread over depth, as many as can be drawn, and what to say of the others."""
    places = rows["place"].unique()
    most = max(1, min(_MOST_PANELS, _MOST_CELLS // (len(rows) // len(places))))
    chosen = np.linspace(0, len(places) - 1, min(most, len(places))).round().astype(int)
    kept = rows[rows["place"].isin(places[chosen])]
    left = len(places) - len(chosen)
    said = f" {left} layers are left out." if left else ""
    return kept.assign(heading="layer " + kept["place"]), said
