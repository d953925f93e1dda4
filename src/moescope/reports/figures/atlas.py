"""Figures of the analysis `atlas`: all pairs of layers, and their experts at a click."""

import altair as alt
import pandas as pd

from moescope.reports.marks import MISSING, diverging, label, matrix, tip
from moescope.reports.panels import Panels
from moescope.reports.registry import Figure, figures
from moescope.runs import Result

COLUMNS = {
    "source_layer, source_expert": "The expert f that is to be imitated.",
    "target_layer, target_expert": "The expert g that imitates it behind a trained adapter A.",
    "overlap": "Cosine of the covariances of the outputs of f and g, each on its own inputs.",
    "short_fvu": "Inner FVU of a short fit; missing where the overlap was too small for one.",
    "place": "Place of g among the experts of its layer, by screening; 1 is the best.",
    "stage": "How far the pair got: overlap, short fit, converged.",
    "sampled": "Whether it was rejected and got a converged fit all the same, by chance.",
    "inner_fvu": "FVU of the converged fit on tokens set aside within the training documents.",
    "fvu": "Fraction of variance unexplained on held-out tokens: 0 is perfect, 1 is the mean.",
    "fvu_linear, fvu_random, fvu_self": "The same of a linear map without g, of random experts, "
    "and of f itself behind a hidden rotation (the ceiling).",
    "score": "(null - fvu) / (null - fvu_self); null: least of linear, either random kind and 1.",
    "score_low, score_high": "95% interval of the score, with the spread of random experts.",
    "p_value, p_holm": "Of doing no better than the linear map and one more random expert; "
    "corrected for all pairs that were looked at.",
    "kind, number": "Of random experts: with the down projection of g, or all three matrices.",
    "claimed": "Whether p_holm is below 0.05; by pair of layers, how many are.",
    "status": "ok, or why there is no number or a weak one.",
    "pairs, n, tested": "Pairs looked at; kept and fitted; with an interval.",
    "best_score, best_low, best_high": "The largest score of a pair of layers, with its interval.",
    "above_zero, share_above": "Intervals above zero, before any correction.",
    "measure, kept": "Of screening; kept: how many targets of a layer count as kept.",
    "chance": "What a random choice would give.",
    "n_sources, n_pairs": "Imitated experts, and pairs, behind it.",
    "fits_of": "Short or converged fits, computed by the call that wrote this.",
    "operations": "Floating-point operations at most.",
}
_PICTURES = {
    "score": ("score", "datum.{}"),
    "R\u00b2 of the pair": ("fvu", "1 - datum.{}"),
    "R\u00b2 of a linear map": ("fvu_linear", "1 - datum.{}"),
    "R\u00b2 of random experts": ("fvu_random", "1 - datum.{}"),
    "R\u00b2 of the ceiling": ("fvu_self", "1 - datum.{}"),
    "overlap of outputs": ("overlap", "datum.{}"),
}
"""By name: column of a pair of experts, and what is shown of it or of its median; all of them are
at most 1, and more is more alike."""
_SHOWN = "score, R\u00b2 or overlap"
"""What the cells show, whichever of them the selector is at."""
Layered = alt.LayerChart | alt.FacetChart

_CELL = 14
_MOST_CELLS = 20_000


@figures(
    "atlas",
    title="Atlas",
    question="Between which layers can an expert do the work of another, up to a change of input?",
    columns=COLUMNS,
)
def draw(result: Result) -> list[Figure]:
    """All pairs of layers with their experts, and what screening misses."""
    pairs, layers = result.table, result.tables["layers"]
    drawn = [_map(pairs, layers)] if layers["n"].any() else []
    measured = result.tables["recall"].query("measure == 'best kept'")
    return drawn + ([_recall(measured)] if len(measured) else [])


def _map(pairs: pd.DataFrame, layers: pd.DataFrame) -> Figure:
    names = [n for n, (column, _) in _PICTURES.items() if layers[f"median_{column}"].notna().any()]
    shown = alt.param(
        name="picture", value=names[0], bind=alt.binding_select(options=names, name="picture ")
    )
    layers, pairs = _named(layers), _named(pairs)
    measured = layers[layers["n"] > 0]
    best = measured[f"median_{'score' if 'score' in names else 'fvu'}"]
    first = str(measured["layers"].iloc[int(best.argmax() if "score" in names else best.argmin())])
    chosen = alt.selection_point(fields=["layers"], value=[{"layers": first}], toggle=False)
    left = _matrix(layers, names, side=0)
    left.layer[0] = left.layer[0].add_params(chosen)
    size = max(230, _CELL * layers["source_layer"].nunique())
    charts = [left.properties(height=size, title="layers, medians")]
    how = ""
    if len(pairs) <= _MOST_CELLS:
        right = _matrix(pairs, names, side=1).transform_filter(chosen)
        charts.append(right.properties(height=size, title="experts of the pair of layers"))
        how = (
            " Right: every expert with every one, of the pair of layers that a click on the left "
            f"chooses; at first {first}."
        )
    return Figure(
        name="atlas-layers",
        title="Between which layers can an expert do another's work?",
        how_to_read="Left: row, the layer that is imitated; column, the layer that imitates; the "
        f"median over the pairs of experts that screening kept.{how} The selector puts others in "
        "the place of the score (0 is the best control, 1 the ceiling): R\u00b2 = 1 - FVU on "
        "held-out tokens of the pairs and of each control (0 is the mean, 1 is perfect). Blue is "
        f"above 0, brown below; {MISSING}.",
        limits="Where screening left pairs out, it kept those that looked best: a median says more "
        "good of a pair of layers than it deserves, and rejected pairs show at the right only if "
        "they were drawn. A score above zero may be chance: the tooltip counts the claimed pairs.",
        chart=alt.concat(*charts).add_params(shown).resolve_scale(color="independent"),
        panels=Panels(count=len(charts), minimum=size, preferred=400),
    )


def _named(table: pd.DataFrame) -> pd.DataFrame:
    arrow = table["source_layer"].astype(str) + " \u2192 " + table["target_layer"].astype(str)
    return table.assign(layers=arrow)


def _matrix(table: pd.DataFrame, names: list[str], side: int) -> Layered:
    """A heat map of the chosen picture: of layers (side 0) or of experts (side 1)."""
    kind = ("layer", "expert")[side]
    x = alt.X(f"target_{kind}:O", title=f"imitating {kind}")
    y = alt.Y(f"source_{kind}:O", title=f"imitated {kind}")
    choice = "null"
    for name in names:
        column, shown = _PICTURES[name]
        column = column if side else f"median_{column}"
        value = f"isValid(datum.{column}) ? {shown.format(column)} : null"
        choice = f"picture === '{name}' ? ({value}) : {choice}"
    colour = diverging("value:Q", _SHOWN, 1.0)
    marks = matrix(x, y, "value", colour, _tooltip(side))
    chart: Layered = alt.layer(*marks, data=table).transform_calculate(value=choice)
    return chart


def _tooltip(side: int) -> list[alt.Tooltip]:
    if side == 0:
        return [
            label("layers", "layers"),
            tip("value", _SHOWN),
            tip("median_score", "score, median"),
            tip("best_score", "best score"),
            tip("best_low", "its 95% interval, from"),
            tip("best_high", "to"),
            tip("claimed", "claimed after correction", ","),
            tip("n", "pairs kept", ","),
            tip("pairs", "of", ","),
        ]
    return [
        label("layers", "layers"),
        label("source_expert", "imitated expert"),
        label("target_expert", "imitating expert"),
        tip("value", _SHOWN),
        tip("score", "score"),
        tip("score_low", "95% interval, from"),
        tip("score_high", "to"),
        tip("fvu", "FVU of the pair"),
        tip("fvu_linear", "FVU of a linear map"),
        tip("short_fvu", "FVU of a short fit"),
        tip("overlap", "overlap"),
        label("stage", "got as far as"),
        label("status", "status"),
    ]


def _recall(measured: pd.DataFrame) -> Figure:
    base = alt.Chart(measured)
    x = alt.X("kept:O", title="targets of a layer that screening keeps")
    scale = alt.Scale(domain=[0, 1])
    tooltip = [
        tip("kept", "kept", ","),
        tip("value", "best is among them"),
        tip("low", "95% interval, from"),
        tip("high", "to"),
        tip("chance", "by chance"),
        tip("n_sources", "imitated experts", ","),
    ]
    return Figure(
        name="atlas-recall",
        title="How often does the screening keep the best?",
        how_to_read="For every imitated expert and target layer: whether the target of least "
        "held-out FVU is among the first that the screening keeps; the mean over imitated experts "
        "with its 95% interval. The dashed line is what a random choice would give.",
        limits="Where all targets do about equally well, missing the best one costs little.",
        chart=alt.layer(
            base.mark_line(style="reference", tooltip=None).encode(x, alt.Y("chance:Q")),
            base.mark_rule(tooltip=None).encode(x, alt.Y("low:Q"), alt.Y2("high:Q")),
            base.mark_point(filled=True, size=60).encode(
                x, alt.Y("value:Q", title="share", scale=scale), tooltip=tooltip
            ),
        ).properties(height=220),
        panels=Panels(minimum=260, preferred=460),
    )
