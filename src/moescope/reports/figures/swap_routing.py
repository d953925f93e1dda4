"""Figures of the routing of every layer with swaps of blocks or experts."""

import altair as alt
import pandas as pd

from moescope.reports.marks import cell_numbers, label, matrix, tip
from moescope.reports.panels import Panels
from moescope.reports.registry import Figure

_MOST_SWAPS = 30


def heat_maps(routing: pd.DataFrame, name: str) -> list[Figure]:
    """The study's Figure 2, for each stack."""
    shown = routing[routing["shown"]]
    return [_heat_map(rows, str(stack), name) for stack, rows in shown.groupby("stack", sort=False)]


def _heat_map(frame: pd.DataFrame, stack: str, name: str) -> Figure:
    swaps = frame["swap"].unique().tolist()
    layers = sorted(frame["layer"].unique())
    experts = frame["expert"].max() + 1
    x = alt.X("expert:O", title="expert")
    y = alt.Y("layer:O", sort=layers, title="layer")
    colour = alt.Color(
        "share:Q",
        title="part of the layer's routing",
        scale=alt.Scale(domain=[0, float(frame["share"].max())], range="ramp"),
        legend=alt.Legend(format=".0%", tickCount=4),
    )
    tooltip = [
        label("swap", "swap"),
        label("layer", "layer"),
        label("router_of", "router of layer"),
        label("expert", "expert"),
        tip("share", "part", ".1%"),
        tip("count", "(token, slot) pairs", ","),
    ]
    chart = (
        alt.layer(*matrix(x, y, "share", colour, tooltip), data=frame)
        .properties(height=max(60, 20 * len(layers)))
        .facet(facet=alt.Facet("swap:N", sort=swaps, header=alt.Header(title=None)))
        .resolve_axis(x="independent", y="independent")
    )
    return Figure(
        name=f"{name}-routing-{stack}",
        title=f"Which experts of the {stack} are used, with which swap?",
        how_to_read="A panel is a swap, the first the model as it is. A row is a layer, a cell the "
        f"part of its routing that goes to an expert; evenly used, it would be {1 / experts:.1%}.",
        limits="Where whole blocks are swapped, a row of a swapped layer shows the experts of the "
        "block that stands there. Equal use does not mean that the same tokens go there.",
        chart=chart,
        panels=Panels(
            count=len(swaps), minimum=max(140, 14 * experts), preferred=max(190, 22 * experts)
        ),
        table=frame.pivot_table(
            index=["swap", "layer"], columns="expert", values="share", sort=False
        )
        .rename(columns=lambda expert: f"expert {expert}")
        .reset_index(),
    )


def distortion(table: pd.DataFrame, name: str) -> Figure:
    """Divergence of the use of experts by swap and layer."""
    swaps = table["swap"].unique().tolist()
    shown = swaps if len(swaps) <= _MOST_SWAPS else table[table["shown"]]["swap"].unique().tolist()
    frame = table[table["swap"].isin(shown)]
    prefix = frame["stack"].str[:3] + " " if len(set(frame["stack"])) > 1 else ""
    frame = frame.assign(place=prefix + frame["layer"].astype(str))
    frame["shade"] = frame["js_bits"].where(frame["side"] != "before")
    frame["strong"] = frame["shade"] > 0.55 * max(frame["shade"].max(), 1e-9)
    places = frame["place"].unique().tolist()
    x = alt.X("place:N", sort=places, title="layer", axis=alt.Axis(orient="top"))
    y = alt.Y("swap:N", sort=shown, title="swap")
    colour = alt.Color(
        "shade:Q",
        title="Jensen-Shannon divergence (bits)",
        scale=alt.Scale(domain=[0, max(float(frame["shade"].max()), 1e-9)], range="ramp"),
    )
    tooltip = [
        label("swap", "swap"),
        label("place", "layer"),
        label("side", "layer is"),
        tip("js_bits", "divergence (bits)", ".4f"),
        tip("js_bits_low", "95% interval, from", ".4f"),
        tip("js_bits_high", "to", ".4f"),
        tip("floor_bits", "between random halves", ".4f"),
    ]
    cells = matrix(x, y, "shade", colour, tooltip)
    numbers = cell_numbers(x, y, "shade", ".3f", "strong")
    left = f" {len(swaps) - len(shown)} swaps are in the table alone." if shown != swaps else ""
    return Figure(
        name=f"{name}-distortion",
        title="How far does a swap move the use of experts?",
        how_to_read="A row is a swap, a column a layer, a cell the divergence of the use of its "
        "experts from that in the model as it is, on the same tokens; of a block that moved, from "
        "its use at home. Hatched: the pass reaches the layer before the swap. Random halves of "
        f"what was read differ by {frame['floor_bits'].median():.4f} bits (median).{left}",
        limits="Zero does not mean that every token goes where it went, only that experts are used "
        "as often. Intervals are in the tooltips and in the table.",
        chart=alt.layer(*cells, *numbers, data=frame).properties(height=22 * len(shown)),
        panels=Panels(minimum=max(260, 44 * len(places)), preferred=80 * len(places)),
    )
