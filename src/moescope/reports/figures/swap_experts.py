"""Figures of the analysis `swap-experts`: what single experts do in each other's place."""

import altair as alt
import pandas as pd

from moescope.reports.figures.swap_blocks import COLUMNS, TITLES
from moescope.reports.figures.swap_routing import distortion, heat_maps
from moescope.reports.marks import label, tip
from moescope.reports.panels import Panels
from moescope.reports.registry import Figure, figures
from moescope.runs import Result

_COLUMNS = COLUMNS | {
    "expert, other_expert": "Numbers of the experts within their layers.",
    "share, other_share": "Part of its layer's routing that goes to the expert (in the table of "
    "swaps, in the model as it is).",
}
_MOST_SWAPS = 36


@figures(
    "swap-experts",
    title="Experts in each other's place",
    question="What happens if single experts of two layers change places?",
    columns=_COLUMNS,
)
def draw(result: Result) -> list[Figure]:
    """Change by swap, and the routing of every layer."""
    drawn = [
        _changes(result.table, measure)
        for measure in ("accuracy", "loss")
        if measure in result.table
    ]
    drawn += heat_maps(result.tables["routing"], "swap-experts")
    return [*drawn, distortion(result.tables["distortion"], "swap-experts")]


def _changes(table: pd.DataFrame, measure: str) -> Figure:
    """Dots with intervals; of very many swaps those that change most."""
    done = table[table[measure].notna()]
    change, low, high = (f"{measure}_difference{end}" for end in ("", "_low", "_high"))
    frame = done.loc[done[change].abs().sort_values(ascending=False).index[:_MOST_SWAPS]]
    frame = frame.sort_index()
    left = len(done) - len(frame)
    y = alt.Y("swap:N", sort=frame["swap"].tolist(), title="layer.expert - layer.expert")
    base = alt.Chart(frame)
    zero = base.mark_rule(style="reference", tooltip=None).encode(x=alt.datum(0))
    spread = base.mark_rule(opacity=0.6, tooltip=None).encode(
        alt.X(f"{low}:Q"), y, x2=alt.X2(f"{high}:Q")
    )
    points = base.mark_point(filled=True, opacity=1, size=38).encode(
        alt.X(f"{change}:Q", title=TITLES[measure], axis=alt.Axis(tickCount=6)),
        y,
        tooltip=[
            label("swap", "experts"),
            tip(change, "change", "+.4f"),
            tip(low, "95% interval, from", "+.4f"),
            tip(high, "to", "+.4f"),
            label(f"{measure}_verdict", "verdict"),
            tip("share", "use of the one", ".1%"),
            tip("other_share", "use of the other", ".1%"),
        ],
    )
    return Figure(
        name=f"swap-experts-{measure}",
        title=f"How does the {measure} change with two experts in each other's place?",
        how_to_read="A row is a pair of experts that changed places, routers as they were; a dot "
        "is the change from the model as it is, on the same text or questions, with its 95% "
        "interval over documents or questions (none under 30)."
        + (f" The {left} swaps that change less are in the table." if left else ""),
        limits="A small change may mean that the two are alike, or that neither matters much: "
        "the rest of the layer, and the residual stream, go on.",
        chart=alt.layer(zero, spread, points).properties(height=max(60, 17 * len(frame))),
        panels=Panels(minimum=280, preferred=620),
    )
