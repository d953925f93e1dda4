"""Heat maps of `weights`: pairs of experts within layers, pairs of layers, and both at a click."""

import altair as alt
import pandas as pd

from moescope.reports.marks import diverging, facet_by_heading, label, logarithmic, matrix, tip
from moescope.reports.panels import Panels
from moescope.reports.registry import Figure

Layered = alt.LayerChart | alt.FacetChart

_MOST_PANELS = 12
_MOST_CELLS = 20_000
_CELL = 12
"""Least width of a cell, in pixels."""


def with_places(table: pd.DataFrame, other: str = "") -> pd.DataFrame:
    """The table with a column `place`: the layer, and the stack where that is an encoder."""
    stack = table[f"{other}stack"].map({"decoder": "", "encoder": "encoder "})
    return table.assign(**{f"{other}place": stack + table[f"{other}layer"].astype(str)})


def experts(pairs: pd.DataFrame) -> Figure:
    """Every pair of experts of a layer, one panel per layer."""
    own = with_places(
        pairs[(pairs["layer"] == pairs["other_layer"]) & (pairs["stack"] == pairs["other_stack"])]
    )
    swapped = own.rename(columns={"expert": "other_expert", "other_expert": "expert"})
    own = pd.concat([own, swapped], ignore_index=True)
    order = own["place"].unique().tolist()
    size = len(own) // len(order)
    shown = _spread(order, max(1, min(_MOST_PANELS, _MOST_CELLS // size)))
    own = own[own["place"].isin(shown)]
    own = own.assign(heading="layer " + own["place"])
    number = own["expert"].nunique()
    x, y = alt.X("other_expert:O", title="expert"), alt.Y("expert:O", title="expert")
    layers = matrix(x, y, "cosine_all", _colour(own["cosine_all"]), _pair_tooltip("layer"))
    chart = facet_by_heading(
        alt.layer(*layers, data=own).properties(height=max(150, _CELL * number)),
        [f"layer {place}" for place in shown],
    )
    left_out = f" {len(order) - len(shown)} layers are left out." if len(shown) < len(order) else ""
    return Figure(
        name="weights-experts",
        title="Which experts of a layer are alike?",
        how_to_read="One panel per layer; a cell is the cosine of two experts as matrices, gate, "
        "up and down each counting the same. Blue: alike, brown: opposite, on one scale around "
        "zero." + left_out,
        limits="Colours span what there is in this model, however little that is: read the scale. "
        "Neurons are compared in their order, which means nothing to an expert.",
        chart=chart,
        panels=Panels(count=len(shown), minimum=max(170, _CELL * number), preferred=300, across=4),
    )


def by_layer(layers: pd.DataFrame, pairs: pd.DataFrame) -> Figure:
    """Every pair of layers, and the experts of the one that is chosen."""
    layers = with_places(with_places(layers), "other_")
    order = list(dict.fromkeys([*layers["place"], *layers["other_place"]]))
    layers = layers.assign(pair=layers["place"] + " and " + layers["other_place"])
    pairs = with_places(with_places(pairs), "other_")
    pairs = pairs.assign(pair=pairs["place"] + " and " + pairs["other_place"])
    apart = layers[(layers["place"] != layers["other_place"]) & layers["best"].notna()]
    kept = (pairs["place"] != pairs["other_place"]).any() and len(pairs) <= _MOST_CELLS
    charts = [_layers(layers, order)]
    how = ""
    if kept and len(apart):
        first = apart.iloc[int(apart["best"].argmax())]["pair"]
        chosen = alt.selection_point(fields=["pair"], value=[{"pair": first}], toggle=False)
        charts = [_layers(layers, order, chosen), _chosen(pairs, chosen)]
        how = (
            " Right: each expert with each, of the two layers that a click on the left chooses; at "
            f"first the most alike, {first}."
        )
    return Figure(
        name="weights-layers",
        title="Are experts of other layers as alike as those of the same?",
        how_to_read="A cell is a pair of layers: the mean, over the experts of both, of the cosine "
        "with the most similar expert of the other layer; on the diagonal with the most similar "
        "other expert of the same layer. Layers of other shapes are hatched." + how,
        limits="The largest of many cosines lies above zero by chance, the more so the more "
        "experts there are; as matrices, neurons are compared in their order.",
        chart=alt.concat(*charts).resolve_scale(color="independent"),
        panels=Panels(count=len(charts), minimum=max(230, _CELL * len(order)), preferred=400),
    )


def _layers(layers: pd.DataFrame, order: list[str], chosen: alt.Parameter | None = None) -> Layered:
    x = alt.X("other_place:N", sort=order, title="layer")
    y = alt.Y("place:N", sort=order, title="layer")
    tooltip = [
        label("place", "layer"),
        label("other_place", "and layer"),
        tip("best", "nearest, mean"),
        tip("mean", "all pairs, mean"),
        tip("n_pairs", "pairs", ","),
        label("status", "status"),
    ]
    colour = logarithmic(layers["best"], "cosine with the nearest", "best")
    if (layers["best"] <= 0).any():
        colour = _colour(layers["best"], "best", "cosine with the nearest")
    marks = matrix(x, y, "best", colour, tooltip)
    if chosen is not None:
        marks[0] = marks[0].add_params(chosen)
    chart: Layered = alt.layer(*marks, data=layers).properties(
        height=max(220, _CELL * len(order)), title="layers"
    )
    return chart


def _chosen(pairs: pd.DataFrame, chosen: alt.Parameter) -> Layered:
    x = alt.X("other_expert:O", title="expert of the second layer")
    y = alt.Y("expert:O", title="expert of the first layer")
    marks = matrix(x, y, "cosine_all", _colour(pairs["cosine_all"]), _pair_tooltip("layers"))
    chart: Layered = (
        alt.layer(*marks, data=pairs)
        .transform_filter(chosen)
        .properties(height=max(220, _CELL * pairs["expert"].nunique()), title="experts")
    )
    return chart


def _pair_tooltip(layers: str) -> list[alt.Tooltip]:
    return [
        label("pair" if layers == "layers" else "place", layers),
        label("expert", "expert"),
        label("other_expert", "and expert"),
        tip("cosine_all", "cosine"),
        tip("average_all", "means of neurons"),
    ]


def _colour(values: pd.Series, field: str = "cosine_all", title: str = "cosine") -> alt.Color:
    """Around zero, as far as the values go."""
    reach = float(f"{values.abs().max():.1g}") if values.notna().any() else 1.0
    colour = diverging(f"{field}:Q", title, max(reach, 0.001))
    return colour.legend(format=".2~g")


def _spread(order: list[str], most: int) -> list[str]:
    """At most so many places, evenly over depth, first and last among them."""
    if len(order) <= most:
        return order
    if most == 1:
        return order[:1]
    return [order[round(i * (len(order) - 1) / (most - 1))] for i in range(most)]
