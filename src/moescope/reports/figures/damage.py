"""Figures of the analysis `damage`: measures against what changes of experts cost."""

import altair as alt
import pandas as pd

from moescope.reports.marks import label, tip
from moescope.reports.panels import Panels
from moescope.reports.registry import Figure, figures
from moescope.runs import Result

COLUMNS = {
    "kind": "zero, the expert's output is set to zero; mask, the router chooses among the others; "
    "swap, two experts change places; substitute, one computes the tokens of the other behind an "
    "adapter.",
    "rise": "Of the loss over the model as it is, nats per token of held-out documents, with its "
    "paired 95% interval over documents.",
    "ranks": "within layers: changes are put in order within a layer, or among four pairs of the "
    "same two layers; pooled: all together.",
    "measure, other": "Computed on other documents than the damage. Of a swap it is the mean over "
    "both experts, of a substitution that of the expert replaced. Likeness (weights, outputs, "
    "router_cosine, CKA) is, of an ablation, that to the nearest of some experts of its layer, and "
    "is turned round: alike should mean little damage.",
    "frequency, mean_weight": "Tokens that use the expert; mean routing weight of these.",
    "output_norm, ean, weighted_norm, reap": "Norm of outputs over these tokens: mean, sum, sum "
    "and mean times the routing weight.",
    "weight_norm": "Norm of all parameters of the expert.",
    "linear_fvu": "FVU that a linear map in the expert's place leaves.",
    "weights_cosine, weights_matched": "Cosine of gate, up and down, and after the best "
    "permutation of neurons.",
    "outputs_cosine, outputs_cka": "Of outputs for the same inputs, those of the expert replaced.",
    "aligned_fvu": "FVU that the other expert leaves behind an adapter, on tokens set aside within "
    "the training documents; of an ablation, the lowest of some experts of other layers.",
    "correlation": "Spearman's, of measure and rise, with its 95% limits over changes (jackknife) "
    "and documents (bootstrap).",
    "difference": "Of two correlations with the same damage, paired.",
    "p_value, p_corrected": "Two-sided; by permutation within layers or draws, of differences by "
    "their error; after Holm's correction over the measures, or pairs of "
    "measures, of a kind and way of ranking.",
    "agreement, ceiling": "Rank correlation of the damage on two halves of the documents; about "
    "the most that any measure could reach on all of them.",
    "n_changes, n_experts": "Changes in order, and the experts that have a part in them.",
    "stratum": "What changes are compared within: the layer, or the draw of four pairs.",
}
_KINDS = {
    "zero": "output set to zero",
    "mask": "masked, as after pruning",
    "swap": "two experts swapped",
    "substitute": "replaced behind an adapter",
}
_MEASURES = {
    "frequency": "frequency",
    "mean_weight": "mean routing weight",
    "output_norm": "mean norm of outputs",
    "ean": "EAN (sum of norms)",
    "weighted_norm": "router-weighted norm",
    "reap": "REAP",
    "weight_norm": "norm of weights",
    "linear_fvu": "FVU of linear map",
    "weights_cosine": "weights, cosine",
    "weights_matched": "weights, matched",
    "outputs_cosine": "outputs, cosine",
    "outputs_cka": "outputs, CKA",
    "router_cosine": "router rows, cosine",
    "aligned_fvu": "FVU behind an adapter",
}
_SIGNIFICANT = 0.05


@figures(
    "damage",
    title="What foretells damage",
    question="Which measure of experts foretells what ablating, swapping or replacing them costs?",
    columns=COLUMNS,
)
def draw(result: Result) -> list[Figure]:
    """Correlations, measures against each other, and the damage itself."""
    tables = result.tables
    if result.table.empty:
        return []
    return [
        _correlations(result.table, tables["reliability"]),
        _differences(tables["differences"], result.table),
        _damage(tables["changes"]),
    ]


def _correlations(table: pd.DataFrame, reliability: pd.DataFrame) -> Figure:
    rows = table.assign(
        heading=table["kind"].map(_KINDS), name=table["measure"].map(_MEASURES)
    ).merge(reliability[["kind", "ranks", "agreement", "ceiling"]], on=["kind", "ranks"])
    inside = rows[rows["ranks"] == "within layers"]
    order = inside.groupby("name")["correlation"].mean().sort_values(ascending=False).index.tolist()
    headings = rows["heading"].unique().tolist()
    y = alt.Y("name:N", sort=order, title=None, axis=alt.Axis(labelOverlap=False))
    offset = alt.YOffset("ranks:N", sort=["within layers", "pooled"])
    colour = alt.Color("ranks:N", sort=["within layers", "pooled"], title="changes in order")
    scale = alt.Scale(domain=[-1, 1])
    axis = alt.Axis(values=[-1, -0.5, 0, 0.5, 1], format=".1f")
    x = alt.X("correlation:Q", title="rank correlation with the damage", scale=scale, axis=axis)
    base = alt.Chart(rows)
    zero = base.mark_rule(style="reference", tooltip=None).encode(x=alt.datum(0))
    most = (
        base.transform_filter("datum.ranks == 'within layers'")
        .transform_aggregate(ceiling="mean(ceiling)", groupby=["heading"])
        .mark_rule(strokeWidth=2, opacity=0.35, tooltip=None)
        .encode(alt.X("ceiling:Q", scale=scale))
    )
    spread = base.mark_rule(opacity=0.6, tooltip=None).encode(
        alt.X("correlation_low:Q", scale=scale), y, colour, offset, x2="correlation_high:Q"
    )
    points = base.mark_point(filled=True, opacity=1, size=34).encode(
        x,
        y,
        colour,
        offset,
        tooltip=[
            label("heading", "change"),
            label("name", "measure"),
            label("ranks", "changes in order"),
            tip("correlation", "rank correlation"),
            tip("correlation_low", "from"),
            tip("correlation_high", "to"),
            tip("p_corrected", "p, corrected", ".3~g"),
            tip("ceiling", "most that can be reached"),
            tip("n_changes", "changes", "d"),
            tip("n_experts", "experts", "d"),
            tip("n_documents", "documents", ",d"),
        ],
    )
    chart = alt.layer(zero, most, spread, points).properties(height=20 * len(order))
    return Figure(
        name="damage-correlations",
        title="Which measure foretells the damage?",
        how_to_read="One panel per kind of change. A dot is the rank correlation of a measure "
        "with the measured rise of the loss, a line its 95% interval over changes and documents. "
        "Likeness is turned round, so that right of zero a measure foretells what it should. "
        "Changes are put in order within layers, or all together. The grey line is about the most "
        "that a measure could reach within layers: on other documents the damage itself has "
        "another order.",
        limits="Pooled, whatever changes with depth goes with the damage if that does too. "
        "Overlapping intervals do not say that two measures are equal, for they share experts: "
        "see the next figure. Swaps and substitutions are of few pairs, no expert in two of them.",
        chart=_by_kind(chart, headings),
        panels=Panels(count=len(headings), minimum=220, preferred=330, across=2, beside=90),
    )


def _differences(differences: pd.DataFrame, table: pd.DataFrame) -> Figure:
    inside = differences[differences["ranks"] == "within layers"]
    turned = inside.rename(columns={"measure": "other", "other": "measure"}).assign(
        difference=-inside["difference"],
        difference_low=-inside["difference_high"],
        difference_high=-inside["difference_low"],
    )
    rows = pd.concat([inside, turned], ignore_index=True)
    rows["heading"] = rows["kind"].map(_KINDS)
    rows["name"], rows["against"] = (rows[c].map(_MEASURES) for c in ("measure", "other"))
    rows["clear"] = rows["p_corrected"] <= _SIGNIFICANT
    means = table[table["ranks"] == "within layers"].groupby("measure")["correlation"].mean()
    order = [_MEASURES[measure] for measure in means.sort_values(ascending=False).index]
    headings = rows["heading"].unique().tolist()
    x = alt.X(
        "against:N", sort=order, title=None, axis=alt.Axis(labelAngle=-60, labelOverlap=False)
    )
    y = alt.Y("name:N", sort=order, title=None, axis=alt.Axis(labelOverlap=False))
    base = alt.Chart(rows)
    cells = base.mark_rect().encode(
        x,
        y,
        alt.Color(
            "difference:Q",
            title="row's correlation less column's",
            scale=alt.Scale(domain=[-1, 1], range="diverging", clamp=True, interpolate="rgb"),
            legend=alt.Legend(values=[-1, -0.5, 0, 0.5, 1], format=".1f"),
        ),
        tooltip=[
            label("heading", "change"),
            label("name", "measure"),
            label("against", "against"),
            tip("difference", "difference"),
            tip("difference_low", "from"),
            tip("difference_high", "to"),
            tip("p_corrected", "p, corrected", ".3~g"),
            tip("n_changes", "changes", "d"),
        ],
    )
    marks = (
        base.transform_filter("datum.clear")
        .mark_point(filled=True, size=22, color="black", opacity=1, tooltip=None)
        .encode(x, y)
    )
    chart = alt.layer(cells, marks).properties(height=17 * len(order))
    return Figure(
        name="damage-differences",
        title="Is one measure a better guide than another?",
        how_to_read="One panel per kind of change. A cell is how much higher the rank correlation "
        "of the measure of its row with the damage is, within layers, than that of its column. A "
        "dot marks those that are clear of zero: paired over the same experts and documents, "
        "corrected over all pairs of measures (Holm).",
        limits="No dot does not mean that two measures are equally good: with as few experts, "
        "large differences go unseen.",
        chart=_by_kind(chart, headings),
        panels=Panels(count=len(headings), minimum=220, preferred=260, across=2, beside=90),
    )


def _damage(changes: pd.DataFrame) -> Figure:
    rows = changes.assign(heading=changes["kind"].map(_KINDS))
    other = rows["other_layer"].astype(str) + "." + rows["other_expert"].astype(str)
    own = rows["layer"].astype(str) + "." + rows["expert"].astype(str)
    rows["place"] = own.where(rows["other_layer"].isna(), own + " with " + other)
    rows = rows.drop(columns=["other_layer", "other_expert"])
    headings = rows["heading"].unique().tolist()
    scale = alt.Scale(type="symlog", constant=0.01, nice=False, padding=8)
    ticks = [-1, -0.1, -0.01, 0, 0.01, 0.03, 0.1, 0.3, 1, 3]
    x = alt.X("layer:O", title="layer of the expert (replaced)")
    offset = alt.XOffset("expert:O")
    base = alt.Chart(rows)
    zero = base.mark_rule(style="reference", tooltip=None).encode(y=alt.datum(0))
    spread = base.mark_rule(opacity=0.5, tooltip=None).encode(
        x, alt.Y("rise_low:Q", scale=scale), alt.Y2("rise_high:Q"), offset
    )
    points = base.mark_point(filled=True, opacity=1, size=22).encode(
        x,
        alt.Y(
            "rise:Q",
            title="rise of the loss (nats per token)",
            scale=scale,
            axis=alt.Axis(values=ticks, format="~g"),
        ),
        offset,
        tooltip=[
            label("heading", "change"),
            label("place", "layer.expert"),
            tip("rise", "rise of the loss", ".3~g"),
            tip("rise_low", "from", ".3~g"),
            tip("rise_high", "to", ".3~g"),
            tip("n_tokens", "tokens", ",d"),
            tip("n_documents", "documents", ",d"),
        ],
    )
    chart = alt.layer(zero, spread, points).properties(height=170)
    layers = rows["layer"].nunique()
    return Figure(
        name="damage-changes",
        title="What does each change cost?",
        how_to_read="One panel per kind of change. A dot is an expert, or a pair of experts at the "
        "layer of the one that is replaced: the rise of the loss on held-out documents, with its "
        "paired 95% interval over documents (none under 30). The scale widens around zero.",
        limits="One change at a time: what several cost together need not be their sum. Nothing "
        "is trained afterwards.",
        chart=_by_kind(chart, headings),
        panels=Panels(count=len(headings), minimum=max(240, 45 * layers), preferred=380, across=2),
    )


def _by_kind(chart: alt.LayerChart | alt.FacetChart, headings: list[str]) -> alt.FacetChart:
    """One panel per kind of change; both axes mean the same in all of them."""
    facet = alt.Facet("heading:N", sort=headings, header=alt.Header(title=None))
    panels: alt.FacetChart = chart.facet(facet=facet).resolve_axis(x="independent")
    return panels
