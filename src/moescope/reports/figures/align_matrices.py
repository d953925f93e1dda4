"""Heat maps of an alignment, by pair of layers: score, FVU, published error."""

from dataclasses import dataclass

import altair as alt
import numpy as np
import pandas as pd

from moescope.reports.figures.align_pairs import (
    ERROR_FIELDS,
    LAYERS,
    MOST_CELLS,
    NAMES,
    SCORE_FIELDS,
    gaps,
    layer_pairs,
    pair_panels,
    pair_tooltip,
    shown_layer_pairs,
    title_of,
)
from moescope.reports.marks import MISSING, cell_numbers, diverging, logarithmic, matrix
from moescope.reports.registry import Figure

Side = alt.LayerChart | alt.FacetChart

_BESIDE = {
    "fvu": "FVU of the pair",
    "fvu_linear": "FVU of a linear map",
    "fvu_random": "FVU of random experts",
    "fvu_self": "FVU of the ceiling",
    "fvu_floor": "FVU of the floor",
}
"""Columns beside the score, on one scale."""
_MOST_WRITTEN = {"score": 12, "error": 6}
"""Columns of a matrix whose cells have room for numbers, three raw errors beside one another."""
_WRITTEN_CELL, _BARE_CELL = 28, 14
"""Least width of a cell in pixels, with a number in it and without."""


def score(pairs: pd.DataFrame) -> Figure:
    """Score of every pair; for a single pair of layers with the errors behind it."""
    groups, which = shown_layer_pairs(pairs)
    written = pairs["target_expert"].nunique() <= _MOST_WRITTEN["score"]
    beside = _BESIDE if len(layer_pairs(pairs)) == 1 and len(pairs) <= MOST_CELLS else {}
    sides: list[Side] = []
    for pair, frame in groups:
        cells = _Cells.of(frame, ("score", *beside), SCORE_FIELDS, written)
        sides.append(cells.score(f"Score, {title_of(pair)}"))
        sides += [cells.fvu(column, name) for column, name in beside.items()]
    return Figure(
        name="align-score",
        title="Which experts can stand in for which?",
        how_to_read="Row: the expert to imitate; column: the expert that imitates it. A score of "
        "1 is what the solver reaches when the answer is a rotation; 0 is no better than a linear "
        f"map, a random expert or the mean, whichever is best; {MISSING}. FVU is the part of the "
        f"variance left unexplained on held-out tokens: 0 is perfect, 1 is the mean.{which}",
        limits="A high score says that the function can be reached by changing the input, not "
        "that the model uses both experts alike; A to B is not B to A." + gaps(pairs),
        chart=alt.concat(*sides).resolve_scale(color="independent"),
        panels=pair_panels(pairs, len(sides), _WRITTEN_CELL if written else _BARE_CELL),
    )


def published(pairs: pd.DataFrame) -> Figure:
    """The published error of every pair beside its held-out FVU and its score."""
    groups, which = shown_layer_pairs(pairs)
    written = pairs["target_expert"].nunique() <= _MOST_WRITTEN["error"]
    sides: list[Side] = []
    for pair, frame in groups:
        cells = _Cells.of(frame, ("published_mse", "fvu", "score"), ERROR_FIELDS, written)
        sides.append(cells.error(f"Published: raw error, {title_of(pair)}"))
        sides.append(cells.fvu("fvu", f"Here: held-out FVU, {title_of(pair)}"))
        sides.append(cells.score(f"Here: score, {title_of(pair)}"))
    return Figure(
        name="align-published",
        title="What does the published protocol say of the same pairs, and what the score?",
        how_to_read="The same pairs in the same order, three times. First the training error after "
        "ten steps: the fainter the cell, the more alike by that protocol. Then the held-out FVU, "
        f"and the score with controls.{which}",
        limits="The raw error is not on one scale for all rows: an expert with large outputs has "
        "a large error, however well it is imitated; see the next figure. Each pair of layers has "
        "colours of its own.",
        chart=alt.concat(*sides).resolve_scale(color="independent"),
        panels=pair_panels(pairs, len(sides), _BARE_CELL, across=3),
        table=_comparison(pairs),
    )


def _comparison(pairs: pd.DataFrame) -> pd.DataFrame:
    """Both orders of the same pairs, and the size of the outputs that explains one of them."""
    groups = pairs.groupby(LAYERS)
    published, scores = groups["published_mse"], groups["score"]
    frame = pairs[["pair", "published_mse"]].copy()
    frame["published_rank"] = published.rank(method="min").astype("Int64")
    frame["output_variance"] = pairs["output_variance"]
    frame["fvu"], frame["score"] = pairs["fvu"], pairs["score"]
    frame["score_rank"] = scores.rank(ascending=False, method="min").astype("Int64")
    frame["parameters_share"] = pairs["parameters_share"]
    frame["status"] = pairs["status"]
    return frame


@dataclass(frozen=True, kw_only=True)
class _Cells:
    """The pairs of one pair of layers; all heat maps of them share one set of data."""

    frame: pd.DataFrame
    fields: tuple[str, ...]
    """What the tooltip tells."""
    written: bool
    """Whether the cells have room for numbers."""

    @classmethod
    def of(
        cls,
        frame: pd.DataFrame,
        values: tuple[str, ...],
        fields: tuple[str, ...],
        written: bool,
    ) -> "_Cells":
        fields = fields if len(frame) <= MOST_CELLS else values
        flags = {_strong(name): _loud(frame[name], name) for name in values if written}
        used = [*LAYERS, *NAMES, *sorted({*values, *fields})]
        return cls(frame=frame[used].assign(**flags), fields=fields, written=written)

    def score(self, title: str) -> Side:
        label = "datum.value <= -1 ? '-1 or less' : datum.label"
        return self._matrix("score", diverging("score", "score", 1.0, label), ".2f", title)

    def fvu(self, value: str, title: str) -> Side:
        scale = alt.Scale(domain=[0, 1], clamp=True, range="ramp", interpolate="rgb")
        more = "datum.value >= 1 ? '1 or more' : datum.label"
        legend = alt.Legend(values=[0, 0.5, 1], format=".1f", labelExpr=more)
        colour = alt.Color(value, type="quantitative", title="FVU", scale=scale, legend=legend)
        return self._matrix(value, colour, ".2f", title)

    def error(self, title: str) -> Side:
        error = self.frame["published_mse"]
        colour = logarithmic(error, "training error (log scale)", "published_mse")
        return self._matrix("published_mse", colour, ".2r", title)

    def _matrix(self, value: str, colour: alt.Color, number: str, title: str) -> Side:
        first = self.frame.iloc[0]
        x = alt.X("target_expert:O", title=f"imitating expert (layer {first['target_layer']})")
        y = alt.Y("source_expert:O", title=f"imitated expert (layer {first['source_layer']})")
        layers = matrix(x, y, value, colour, pair_tooltip(self.fields))
        if self.written:
            layers += cell_numbers(x, y, value, number, _strong(value))
        step = alt.Step(34 if self.written else 16)
        cells = self.frame.drop(columns=LAYERS)
        return alt.layer(*layers, data=cells).properties(height=step, title=title)


def _strong(value: str) -> str:
    return f"strong_{value}"


def _loud(values: "pd.Series[float]", name: str) -> "pd.Series[int]":
    """1 for cells dark enough to need the second ink, else 0."""
    if name == "published_mse":
        log = np.log(values.where(values > 0))
        loud = (log - log.min()) > 0.55 * (log.max() - log.min())
    else:
        loud = values.abs() > 0.6
    flags: pd.Series[int] = loud.astype(int)
    return flags
