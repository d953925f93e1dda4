"""Figures of the analysis `align`: which experts of one layer others can imitate."""

import altair as alt
import numpy as np
import pandas as pd

from moescope.reports.figures import align_distributions, align_fits
from moescope.reports.figures.align_pairs import (
    PAIR_FIELDS,
    gaps,
    layer_pairs,
    measured,
    pair_panels,
    pair_tooltip,
    title_of,
)
from moescope.reports.marks import MISSING, cell_numbers, diverging, logarithmic, matrix
from moescope.reports.registry import Figure, figures
from moescope.runs import Result

Side = alt.LayerChart | alt.FacetChart

COLUMNS = {
    "source_layer, source_expert": "The expert f that is to be imitated.",
    "target_layer, target_expert": "The expert g that imitates it behind a trained adapter A.",
    "n_train, n_val": "Tokens for fitting, and held out.",
    "n_documents": "Documents behind the held-out tokens and the intervals.",
    "mse_mean, mse_sum": "Held-out squared error of g(A(x)), averaged or summed over dimensions.",
    "published_mse": "Training error of the published protocol: 10 Adam steps on the same tokens.",
    "fvu": "Fraction of variance unexplained on held-out tokens: 0 is perfect, 1 is the mean.",
    "fvu_low, fvu_high": "95% interval of fvu, over documents.",
    "cosine": "Mean cosine between g(A(x)) and f(x).",
    "token_error": "Median over tokens of the relative error.",
    "fvu_constant": "fvu of an adapter that ignores its input.",
    "fvu_identity": "fvu without any adapter.",
    "fvu_linear": "fvu of a ridge regression from x to f(x), without any expert.",
    "fvu_random, fvu_random_sd": "Mean and spread of fvu when g is a random expert.",
    "fvu_random_down, fvu_random_all": "The same by kind: true down projection, nothing true.",
    "fvu_floor": "fvu that no adapter can pass below, given what g can put out at all.",
    "fvu_self": "fvu when g is f itself behind a hidden rotation: what the solver can reach.",
    "score": "(null - fvu) / (null - fvu_self); null: least of linear, either random kind and 1.",
    "score_low, score_high": "95% interval of the score, with the spread of random experts.",
    "steps, converged": "Steps of the fit, and whether it had come to rest.",
    "self_converged": "Whether the fit behind fvu_self had come to rest.",
    "constant_kept": "Whether no fit beat the adapter that ignores its input.",
    "status": "ok, or why there is no number or a weak one.",
    "adapter_parameters, expert_parameters": "Size of the adapter, and of an expert.",
}


@figures(
    "align",
    title="Alignment",
    question="Which experts of one layer can be imitated by experts of another, if only the "
    "input may be changed, and better than without the expert?",
    columns=COLUMNS,
)
def draw(result: Result) -> list[Figure]:
    """Score, its controls, raw error beside it, convergence, and the distributions behind."""
    pairs = measured(result.table)
    drawn = [_score(pairs), align_fits.controls(pairs)]
    if pairs["published_mse"].notna().any():
        drawn += [_published(pairs), align_fits.error_against_size(pairs)]
    further = {
        "curves": align_fits.convergence,
        "distributions": align_distributions.histograms,
        "pca": align_distributions.principal_components,
    }
    present = [name for name in further if not result.tables.get(name, pd.DataFrame()).empty]
    return drawn + [further[name](result.tables[name]) for name in present]


_BESIDE = {
    "fvu": "FVU of the pair",
    "fvu_linear": "FVU of a linear map",
    "fvu_random": "FVU of random experts",
    "fvu_self": "FVU of the ceiling",
    "fvu_floor": "FVU of the floor",
}
"""Columns beside the score, on one scale."""
_MOST_WRITTEN = 12
"""Columns of a matrix whose cells have room for numbers."""


def _score(pairs: pd.DataFrame) -> Figure:
    groups = layer_pairs(pairs)
    sides = [_score_matrix(frame, f"Score, {title_of(pair)}") for pair, frame in groups]
    if len(groups) == 1:
        sides += [_fvu_matrix(pairs, column, name) for column, name in _BESIDE.items()]
    return Figure(
        name="align-score",
        title="Which experts can stand in for which?",
        how_to_read="Row: the expert to imitate; column: the expert that imitates it. A score of "
        "1 is what the solver reaches when the answer is known; 0 is no better than a linear map, "
        f"a random expert or the mean, whichever is best; {MISSING}. FVU is the part of the "
        "variance left unexplained on held-out tokens: 0 is perfect, 1 is the mean.",
        limits="A high score says that the function can be reached by changing the input, not "
        "that the model uses both experts alike; A to B is not B to A." + gaps(pairs),
        chart=alt.concat(*sides).resolve_scale(color="independent"),
        panels=pair_panels(pairs, len(sides)),
    )


def _axes(frame: pd.DataFrame) -> tuple[alt.X, alt.Y]:
    first = frame.iloc[0]
    return (
        alt.X("target_expert:O", title=f"imitating expert (layer {first['target_layer']})"),
        alt.Y("source_expert:O", title=f"imitated expert (layer {first['source_layer']})"),
    )


def _matrix(frame: pd.DataFrame, value: str, colour: alt.Color, number: str, title: str) -> Side:
    x, y = _axes(frame)
    layers = matrix(x, y, value, colour, pair_tooltip())
    experts = frame["target_expert"].nunique()
    if experts <= _MOST_WRITTEN:
        layers += cell_numbers(x, y, value, number, "strong")
    used = {"source_expert", "target_expert", "strong", value, *PAIR_FIELDS}
    step = alt.Step(34 if experts <= _MOST_WRITTEN else 16)
    return alt.layer(*layers, data=frame[sorted(used)]).properties(height=step, title=title)


def _score_matrix(frame: pd.DataFrame, title: str) -> Side:
    frame = frame.assign(strong=frame["score"].abs() > 0.6)
    colour = diverging("score", "score", 1.0, "datum.value <= -1 ? '-1 or less' : datum.label")
    return _matrix(frame, "score", colour, ".2f", title)


def _fvu_matrix(frame: pd.DataFrame, value: str, title: str) -> Side:
    frame = frame.assign(strong=frame[value] > 0.6)
    scale = alt.Scale(domain=[0, 1], clamp=True, range="ramp", interpolate="rgb")
    more = "datum.value >= 1 ? '1 or more' : datum.label"
    legend = alt.Legend(values=[0, 0.5, 1], format=".1f", labelExpr=more)
    colour = alt.Color(value, type="quantitative", title="FVU", scale=scale, legend=legend)
    return _matrix(frame, value, colour, ".2f", title)


def _error_matrix(frame: pd.DataFrame, title: str) -> Side:
    error = frame["published_mse"]
    log = np.log(error.where(error > 0))
    frame = frame.assign(strong=(log - log.min()) > 0.55 * (log.max() - log.min()))
    colour = logarithmic(error, "training error (log scale)", "published_mse")
    return _matrix(frame, "published_mse", colour, ".2r", title)


def _published(pairs: pd.DataFrame) -> Figure:
    sides: list[Side] = []
    for pair, frame in layer_pairs(pairs):
        sides.append(_error_matrix(frame, f"Published protocol: raw error, {title_of(pair)}"))
        sides.append(_score_matrix(frame, f"Here: score, {title_of(pair)}"))
    return Figure(
        name="align-published",
        title="What does the published protocol say of the same pairs, and what the score?",
        how_to_read="The same pairs in the same order. Left (or above): training error after ten "
        "steps; the fainter the cell, the more alike by that protocol. Right: the score with "
        "controls.",
        limits="The raw error is not on one scale for all rows: an expert with large outputs has "
        "a large error, however well it is imitated; see the next figure.",
        chart=alt.concat(*sides).resolve_scale(color="independent"),
        panels=pair_panels(pairs, len(sides)),
        table=_comparison(pairs),
    )


def _comparison(pairs: pd.DataFrame) -> pd.DataFrame:
    """Both orders of the same pairs, and the size of the outputs that explains one of them."""
    frame = pairs[["pair", "published_mse"]].copy()
    frame["published_rank"] = pairs["published_mse"].rank(method="min").astype("Int64")
    frame["output_variance"] = pairs["output_variance"]
    frame["fvu"], frame["score"] = pairs["fvu"], pairs["score"]
    frame["score_rank"] = pairs["score"].rank(ascending=False, method="min").astype("Int64")
    frame["status"] = pairs["status"]
    return frame
