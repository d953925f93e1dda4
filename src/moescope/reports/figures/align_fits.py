"""What lies behind an alignment score: its controls, the size of outputs, convergence."""

import altair as alt
import pandas as pd

from moescope.reports.figures.align_pairs import (
    ERROR_FIELDS,
    LAYERS,
    NAMES,
    gaps,
    naming,
    pair_tooltip,
    several_layers,
    shown_layer_pairs,
    title_of,
)
from moescope.reports.marks import diverging, label, tip
from moescope.reports.panels import Panels
from moescope.reports.registry import Figure

CONTROLS = {
    "fvu": "the pair, 95% interval",
    "fvu_linear": "linear map, no expert",
    "fvu_random": "random experts, mean and sd",
    "fvu_constant": "constant output",
    "fvu_self": "ceiling: itself, rotated",
    "fvu_floor": "floor of the output space",
}
_SHAPES = ["circle", "square", "diamond", "cross", "triangle-up", "triangle-right"]
_MOST_ROWS = 64
_MOST_SOURCES = 12
_MOST_CURVES = 5
_MOST_DOTS = 1_600
_HIGHEST_FVU = 2.0


def controls(pairs: pd.DataFrame) -> Figure:
    """FVU of every pair beside the FVU of its controls, on one axis."""
    shown, which = _rows(pairs)
    marks = _long(shown)
    top = min(_HIGHEST_FVU, max(1.05, 1.05 * marks["high"].max()))
    x = _fvu_axis("value:Q", top)
    y = alt.Y("pair:N", title=None, sort=shown["pair"].tolist()).axis(grid=True)
    names = list(CONTROLS.values())
    key = alt.Legend(title=None, columns=2)
    colour = alt.Color("control:N", scale=alt.Scale(domain=names, range="category"), legend=key)
    shape = alt.Shape("control:N", scale=alt.Scale(domain=names, range=_SHAPES), legend=key)
    base = alt.Chart(marks)
    bars = base.mark_rule(strokeWidth=2, opacity=0.7, tooltip=None)
    points = base.mark_point(filled=True, size=58, opacity=1)
    mean = alt.Chart(pd.DataFrame({"value": [1.0]})).mark_rule(style="reference", tooltip=None)
    missing = shown.loc[shown["fvu"].isna(), ["pair", "status"]]
    reasons = missing.assign(value=0.0, reason=missing["status"].str.replace("_", " "))
    note = alt.Chart(reasons)
    chart = alt.layer(
        mean.encode(x),
        bars.encode(_fvu_axis("low:Q", top), alt.X2("high:Q"), y, colour),
        points.encode(x, y, colour, shape, tooltip=_control_tooltip()),
        note.mark_text(style="note", dx=6).encode(x, y, alt.Text("reason:N")),
    )
    return Figure(
        name="align-controls",
        title="Does the imitating expert help, or would anything do?",
        how_to_read="One row is one pair. The expert helps only where the round mark lies left "
        "of both the linear map and the random experts; the dashed line is the mean predictor; "
        f"marks beyond {_HIGHEST_FVU:g} are drawn at the edge.{naming(pairs)}",
        limits="The ceiling is what this solver reaches on a problem with a known answer, not a "
        f"bound on every solver.{which}{gaps(pairs)}",
        chart=chart.properties(height=alt.Step(22)),
        panels=Panels(minimum=230, preferred=720, beside=90),
    )


def _fvu_axis(field: str, top: float) -> alt.X:
    scale = alt.Scale(domain=[0, top], clamp=True)
    axis = alt.Axis(format=".1f", tickCount=6)
    return alt.X(field, title="held-out FVU (0 is perfect)", scale=scale, axis=axis)


def _rows(pairs: pd.DataFrame) -> tuple[pd.DataFrame, str]:
    """All pairs or, where they are many, the best of each imitated expert, and words for it."""
    if len(pairs) <= _MOST_ROWS:
        return pairs, ""
    ordered = pairs.sort_values("score", ascending=False, na_position="last", kind="stable")
    best = ordered.groupby(["source_layer", "target_layer", "source_expert"]).head(1)
    chosen = pairs.loc[best.index[:_MOST_ROWS].sort_values()]
    return chosen, f" Shown is the best pair of {len(chosen)} imitated experts."


def _long(pairs: pd.DataFrame) -> pd.DataFrame:
    """One row per pair and control: pair, control, value, low, high."""
    frames = []
    for column, name in CONTROLS.items():
        value = pairs[column]
        frame = pairs[["pair", "status", "n_val", "n_documents"]].assign(control=name, value=value)
        low, high = value, value
        if column == "fvu":
            low, high = pairs["fvu_low"], pairs["fvu_high"]
        if column == "fvu_random":
            low, high = value - pairs["fvu_random_sd"], value + pairs["fvu_random_sd"]
        frames.append(frame.assign(low=low.fillna(value), high=high.fillna(value)))
    return pd.concat(frames, ignore_index=True).dropna(subset=["value"])


def _control_tooltip() -> list[alt.Tooltip]:
    return [
        label("pair", "pair"),
        label("control", "control"),
        tip("value", "FVU"),
        tip("low", "from"),
        tip("high", "to"),
        label("status", "status of the pair"),
        tip("n_val", "held-out tokens", ","),
        tip("n_documents", "documents", ","),
    ]


def error_against_size(pairs: pd.DataFrame) -> Figure:
    """Published error against the variance of the outputs that are imitated."""
    groups, which = shown_layer_pairs(pairs)
    if any(len(frame) > _MOST_DOTS for _, frame in groups):
        groups = [(pair, frame.sample(_MOST_DOTS, random_state=0)) for pair, frame in groups]
        which += f" Of the pairs of experts, {_MOST_DOTS:,} are drawn, chosen at random."
    panels = [_size_panel(frame, title_of(pair)) for pair, frame in groups]
    return Figure(
        name="align-error-against-size",
        title="Does the raw error measure likeness, or only the size of the outputs?",
        how_to_read="One dot is one pair. Dots along a rising line: the raw error says how large "
        f"the outputs of the imitated expert are. Colour is the score.{which}",
        limits="A rising line does not prove that all pairs are equally alike; it says that the "
        "raw error cannot tell.",
        chart=alt.concat(*panels),
        panels=Panels(count=len(panels), minimum=240, preferred=560 if len(panels) == 1 else 380),
    )


def _size_panel(frame: pd.DataFrame, title: str) -> alt.Chart:
    known = frame[(frame["output_variance"] > 0) & (frame["published_mse"] > 0)]
    log = alt.Scale(type="log", nice=False, padding=12)
    axis = alt.Axis(format=".2~g", tickCount=5, grid=False)
    chart: alt.Chart = (
        alt.Chart(known[[*NAMES, *ERROR_FIELDS]])
        .mark_circle(size=85, opacity=1, stroke="gray", strokeWidth=0.6)
        .encode(
            alt.X("output_variance:Q", scale=log, axis=axis, title="variance of f(x)"),
            alt.Y("published_mse:Q", scale=log, axis=axis, title="published error"),
            diverging("score", "score", 1.0),
            tooltip=pair_tooltip(ERROR_FIELDS),
        )
        .properties(height=260, title=title)
    )
    return chart


_CURVE_NAMES = {"pair": "pair", "self": "calibration: itself, rotated"}


def convergence(curves: pd.DataFrame) -> Figure:
    """Inner validation FVU against steps, for pairs and for the calibration."""
    shown, which = _curves_of_some(curves)
    order = shown["heading"].unique().tolist()
    top = min(_HIGHEST_FVU, max(1.05, float(shown["fvu"].max())))
    names = list(_CURVE_NAMES.values())
    key = alt.Legend(title=None, columns=2)
    colours = alt.Scale(domain=names, range="category")
    dashes = alt.Scale(domain=names, range=[[1, 0], [5, 3]])
    chart = (
        alt.Chart(shown)
        .mark_line(clip=True, opacity=0.8)
        .encode(
            alt.X("step:Q", title="step", axis=alt.Axis(tickCount=4)),
            alt.Y("fvu:Q", title="validation FVU", scale=alt.Scale(domain=[0, top])),
            alt.Color("curve:N", scale=colours, legend=key),
            alt.StrokeDash("curve:N", legend=key, scale=dashes),
            detail="target_expert:N",
            tooltip=[
                label("target_expert", "imitating expert"),
                label("curve", "curve"),
                tip("step", "step", ","),
                tip("fvu", "validation FVU"),
            ],
        )
        .properties(height=130)
        .facet(facet=alt.Facet("heading:N", sort=order, header=alt.Header(title=None)))
        .resolve_axis(x="independent")
    )
    return Figure(
        name="align-convergence",
        title="Had the fits come to rest?",
        how_to_read="Error on an inner part of the training tokens against steps; a line that "
        "still falls at its end was stopped too early. The dashed calibration has a perfect "
        f"answer, so what it leaves is left by the solver.{which}",
        limits="A curve at rest need not be the best there is; the held-out tokens of the score "
        "are not used here.",
        chart=chart,
        panels=Panels(count=len(order), minimum=200, preferred=300),
    )


def _curves_of_some(curves: pd.DataFrame) -> tuple[pd.DataFrame, str]:
    """Points of some imitated experts, about as many of each pair of layers, and what is left out.

    Of the pairs of an expert, those that end lowest; its calibration once.
    """
    source = [*LAYERS, "source_expert"]
    groups = len(curves[LAYERS].drop_duplicates())
    each = _MOST_SOURCES if groups == 1 else max(1, _MOST_SOURCES // (2 * groups))
    sources = curves[source].drop_duplicates().sort_values(source)
    chosen = sources.groupby(LAYERS).head(each).head(_MOST_SOURCES)
    points = chosen.merge(curves, on=source)
    line = [*source, "kind", "target_expert"]
    last = points.drop_duplicates(line, keep="last")[[*line, "fvu"]]
    last["place"] = last.sort_values("fvu").groupby([*source, "kind"]).cumcount()
    drawn = last[last["place"] < last["kind"].map({"pair": _MOST_CURVES, "self": 1})]
    points = points.merge(drawn[line])
    heading = "imitated expert " + points["source_expert"].astype(str)
    if several_layers(curves):
        layers = zip(points["source_layer"], points["target_layer"], strict=True)
        heading += [f", {title_of(pair)}" for pair in layers]
    points = points.assign(heading=heading, curve=points["kind"].map(_CURVE_NAMES))
    left = len(sources) - len(chosen)
    which = f" {left} further imitated experts are in the table." if left else ""
    most = points[points["kind"] == "pair"].groupby("heading")["target_expert"].nunique().max()
    if most == _MOST_CURVES:
        which += f" Of each, at most the {_MOST_CURVES} pairs that end lowest are drawn."
    return points[["heading", "target_expert", "curve", "step", "fvu"]], which
