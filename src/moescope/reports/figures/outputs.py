"""Figures of the analysis `outputs`: likeness by depth and by pair, norms against scores."""

import altair as alt
import pandas as pd

from moescope.reports.figures.outputs_layers import by_layer, series, spread
from moescope.reports.figures.outputs_weights import WEIGHTS_COLUMNS, weights_figure
from moescope.reports.figures.weights_matrices import Layered, with_places
from moescope.reports.marks import (
    cell_numbers,
    diverging,
    facet_by_heading,
    label,
    matrix,
    tip,
)
from moescope.reports.panels import Panels
from moescope.reports.registry import Figure, figures
from moescope.runs import Result

COLUMNS = {
    "tokens": "All of them; first, the first positions of rows and documents; later, the others.",
    "pairs": "Pairs of experts of a token: all; those of two experts that it used (both_chosen), "
    "of one, of none; chosen_minus_not, both_chosen less none_chosen of the same token.",
    "measure": "cosine; centred_cosine, after the mean output of each expert over later tokens is "
    "taken off; angular, 1 - acos(cosine) / pi: 0.5 is orthogonal. Of norms: spearman, correlation "
    "over the experts of a token of the ranks of output norm and router logit; partial, the same "
    "over all tokens given the mean norm rank of each expert; hit_rate, share of tokens whose "
    "longest output is that of an expert that they used.",
    "value": "Mean over tokens, of means over pairs; partial is one correlation over all.",
    "value_low, value_high": "95% interval over documents (none under 30 documents); so with "
    "mean_norm_low, mean_norm_high.",
    "chance": "Where scores say nothing about norms.",
    "later_": "Without first positions.",
    "mean_norm": "Of the unweighted output of an expert for every token, used or not.",
    "longest": "Share of tokens for which no other expert has a longer output.",
    "chosen": "Share of tokens that used the expert.",
    "score_rank, norm_rank": "Within a token, from 1 for the smallest.",
    "share": "Of the tokens' experts with this score rank, those with this norm rank.",
} | WEIGHTS_COLUMNS

_MEASURES = {
    "angular": "angular similarity",
    "cosine": "cosine",
    "centred_cosine": "centred cosine",
}
_PAIRS = {
    "all": "all pairs",
    "both_chosen": "both used",
    "one_chosen": "one used",
    "none_chosen": "neither used",
}
_CORRELATIONS = {"spearman": "Spearman", "partial": "given each expert's mean"}
PUBLISHED = (0.33, 0.23, 0.20, 0.19, 0.20, 0.25, 0.38, 0.69)
"""Diagonal of the rank matrix of Mixtral (A Closer Look into MoE), ranks 1 to 8."""
_MOST_NUMBERS = 8
"""Ranks up to which shares are written into their cells."""
_CELL = 8
"""Least width of a cell, in pixels."""
_SAMPLE = " 95% intervals are over documents (none under 30 documents)."


@figures(
    "outputs",
    title="Outputs of all experts",
    question="How alike are the outputs of all experts, and does the router prefer long ones?",
    columns=COLUMNS,
)
def draw(result: Result) -> list[Figure]:
    """Likeness by depth and by pair; ranks of norm and score."""
    tables = {name: with_places(table) for name, table in result.tables.items() if "layer" in table}
    drawn = [
        _depth(tables["outputs"]),
        _experts(tables["pairs"]),
        _preference(tables["norms"]),
        _ranks(tables["ranks"]),
    ]
    if "weights" in tables and tables["weights"]["value"].notna().any():
        drawn.append(weights_figure(tables["weights"], tables["pairs"]))
    return drawn


def _depth(table: pd.DataFrame) -> Figure:
    rows = table[(table["tokens"] == "all") & table["pairs"].isin(list(_PAIRS))]
    rows = rows[rows["value"].notna()].assign(series=rows["pairs"].map(_PAIRS))
    panels = [
        _depth_panel(rows[rows["measure"] == name], title) for name, title in _MEASURES.items()
    ]
    return Figure(
        name="outputs-depth",
        title="How alike are the outputs of a layer's experts for the same token?",
        how_to_read="Every expert was given every token. A dot is the mean over tokens, of all "
        "pairs of experts and of those of which the token used both, one or neither. Dashed: "
        "orthogonal outputs." + _SAMPLE + " Left: 1 for the same direction, 0 for the opposite. "
        "Right: after each expert's mean output is taken off, so that what an expert adds "
        "whatever the token counts for nothing.",
        limits="Outputs are compared by direction, without the weights: how much each adds is not "
        "in it. An expert that did not see such tokens in training computes something all the "
        "same, which the model never uses.",
        chart=alt.concat(*panels),
        panels=Panels(count=3, minimum=max(220, 14 * rows["place"].nunique()), preferred=400),
    )


def _depth_panel(rows: pd.DataFrame, title: str) -> Layered:
    colour = alt.Color(
        "series:N",
        title=None,
        sort=None,
        scale=alt.Scale(domain=list(_PAIRS.values()), range="category"),
        legend=alt.Legend(columns=4, symbolType="circle"),
    )
    level = 0.5 if title == _MEASURES["angular"] else 0.0
    return by_layer(rows, colour, title, level, label("series", "pairs"))


def _experts(pairs: pd.DataFrame) -> Figure:
    swapped = pairs.rename(columns={"expert": "other_expert", "other_expert": "expert"})
    rows, left_out = spread(pd.concat([pairs, swapped], ignore_index=True))
    x, y = alt.X("other_expert:O", title="expert"), alt.Y("expert:O", title="expert")
    reach = float(f"{rows['cosine'].abs().max():.1g}") if rows["cosine"].notna().any() else 1.0
    colour = diverging("cosine:Q", "mean cosine", max(reach, 0.001)).legend(format=".2~g")
    tooltip = [
        label("place", "layer"),
        label("expert", "expert"),
        label("other_expert", "and expert"),
        *(tip(name, title) for name, title in _MEASURES.items()),
        tip("later_cosine", "cosine, without first positions"),
    ]
    number = rows["expert"].nunique()
    return Figure(
        name="outputs-experts",
        title="Which experts of a layer give similar outputs?",
        how_to_read="One panel per layer; a cell is the mean over tokens of the cosine of the "
        "outputs of two experts. Blue: alike, brown: opposite, on one scale around zero."
        + left_out,
        limits="Colours span what there is in this model, however little that is: read the scale. "
        "A mean near 0 may hide tokens for which two experts agree and others for which they are "
        "opposed.",
        chart=_facets(alt.layer(*matrix(x, y, "cosine", colour, tooltip), data=rows), rows, number),
        panels=_facet_panels(rows, number),
    )


def _preference(table: pd.DataFrame) -> Figure:
    rows = table[(table["tokens"] == "all") & table["value"].notna()]
    ranks = rows[rows["measure"] != "hit_rate"]
    ranks = ranks.assign(series=ranks["measure"].map(_CORRELATIONS))
    hits = rows[rows["measure"] == "hit_rate"].assign(series="longest is used")
    chance = float(hits["chance"].mean()) if len(hits) else 0.0
    panels = [
        by_layer(part, series(part), title, level, label("series", "measure"))
        for part, title, level in (
            (ranks, "correlation of norm and score", 0.0),
            (hits, "tokens whose longest is used", chance),
        )
    ]
    return Figure(
        name="outputs-preference",
        title="Does the router prefer experts with long outputs?",
        how_to_read="Left: correlation, over the experts of a token, of the ranks of their output "
        "norms and their router logits, mean over tokens; and the same over all tokens given the "
        "mean norm rank of each expert, so that an expert that is always long, and often chosen, "
        "does not make it. Right: share of tokens whose longest output is that of an expert that "
        "they used. Dashed: chance, mean over layers." + _SAMPLE,
        limits="That norm and score go together does not say which makes which: training may "
        "lengthen the outputs of experts where they are used. Outputs are unweighted.",
        chart=alt.concat(*panels).resolve_scale(color="independent"),
        panels=Panels(count=2, minimum=max(240, 14 * rows["place"].nunique()), preferred=400),
    )


def _ranks(table: pd.DataFrame) -> Figure:
    rows, left_out = spread(table)
    number = int(rows["score_rank"].max())
    chance = 1 / number
    rows = rows.assign(excess=rows["share"] - chance)
    reach = float(f"{max(rows['excess'].abs().max(), 0.001):.1g}")
    rows = rows.assign(strong=rows["excess"].abs() > 0.7 * reach)
    x = alt.X("norm_rank:O", title="rank of output norm")
    y = alt.Y("score_rank:O", title="rank of router score", sort="descending")
    colour = diverging("excess:Q", "share above chance", reach).legend(format=".2~g")
    tooltip = [
        label("place", "layer"),
        label("score_rank", "rank of score"),
        label("norm_rank", "rank of norm"),
        tip("share", "share"),
        tip("count", "tokens", ","),
    ]
    marks = matrix(x, y, "excess", colour, tooltip)
    if number <= _MOST_NUMBERS:
        marks += cell_numbers(x, y, "share", ".2f", "strong")
    published = ", ".join(f"{share:.2f}" for share in PUBLISHED)
    return Figure(
        name="outputs-ranks",
        title="Is the expert with the higher score the one with the longer output?",
        how_to_read="One panel per layer; of the experts with one rank of router score within "
        "their token (a row, the highest score on top) the share with each rank of output norm "
        f"(a column, the longest on the right). By chance every cell holds {chance:.3f}. Were "
        "norms to follow scores, the diagonal from bottom left to top right would hold all."
        + left_out,
        limits="An expert that is always long and always preferred makes such a diagonal too. "
        f"Published diagonal of Mixtral, another model, ranks 1 to 8: {published} (chance 0.125).",
        chart=_facets(alt.layer(*marks, data=rows), rows, number),
        panels=_facet_panels(rows, number),
    )


def _facets(layers: Layered, rows: pd.DataFrame, number: int) -> alt.FacetChart:
    height = max(150, _CELL * number)
    return facet_by_heading(layers.properties(height=height), rows["heading"].unique().tolist())


def _facet_panels(rows: pd.DataFrame, number: int) -> Panels:
    count = rows["heading"].nunique()
    return Panels(count=count, minimum=max(200, _CELL * number), preferred=300, across=3)
