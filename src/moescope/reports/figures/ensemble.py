"""Figures of the analysis `ensemble`: one expert against all that a token uses, by layer."""

import altair as alt
import pandas as pd

from moescope.reports.marks import label, tip
from moescope.reports.panels import Panels
from moescope.reports.registry import Figure, figures
from moescope.runs import Result

COLUMNS = {
    "stack": "Decoder or encoder.",
    "layer": "The model's own layer number.",
    "top_k": "Routed experts per token.",
    "form": "What the experts are added to on both sides: routed, nothing; block, the shared "
    "expert; residual, the residual stream and the shared expert; published, the normed input of "
    "the block and the shared expert.",
    "compared": "Held against the output with all experts: that with the expert of the largest "
    "weight (top), a random one of those used, the one of the smallest weight (lowest); no routed "
    "expert (shared_only); not even the shared one (residual_only).",
    "measure": "cosine; centred_cosine, after the mean over tokens is taken from both; norm_ratio; "
    "relative_error, norm of the difference over norm of the output with all.",
    "median, mean": "Over tokens.",
    "median_low, median_high": "95% interval over documents; so with mean_low, mean_high.",
}

_FORMS = {
    "routed": "routed experts alone",
    "block": "and the shared expert",
    "residual": "in the residual stream",
    "published": "as published: on the normed input",
}
_COMPARED = {
    "top": "expert of the largest weight",
    "random": "a random one of those used",
    "lowest": "expert of the smallest weight",
    "shared_only": "no routed expert",
    "residual_only": "nothing but the stream or input",
}
_SAMPLE = (
    " A dot is the median over tokens, with its 95% interval over documents (none under 30 "
    "documents)."
)


@figures(
    "ensemble",
    title="One expert against all",
    question="How like the output with all K experts is that with the best expert alone?",
    columns=COLUMNS,
)
def draw(result: Result) -> list[Figure]:
    """Each measure by layer, in four forms, beside its controls."""
    table = result.table
    return [
        Figure(
            name="ensemble-cosine",
            title="Does the best expert alone point the same way as all together?",
            how_to_read="Cosine between the output with one expert and that with all that the "
            "token uses, in four forms: what is added on both sides differs." + _SAMPLE + " The "
            "higher the lines of controls lie, the less the blue line says.",
            limits="A stream or an input that is long against the output of the experts makes any "
            "two sums alike: the cosines of the last two forms are mostly its own. Where the "
            "output of the block is normed or scaled before it is added, the stream is not this "
            "sum.",
            chart=_by_layer(table, "cosine", "cosine"),
            panels=_panels(table),
        ),
        Figure(
            name="ensemble-centred-cosine",
            title="And without what is the same for every token?",
            how_to_read="The same cosine after the mean over all tokens was taken from each of the "
            "two outputs: a large constant direction counts for nothing." + _SAMPLE,
            limits="What varies from token to token in the stream still counts, and most of it is "
            "not the experts' work.",
            chart=_by_layer(table, "centred_cosine", "centred cosine"),
            panels=_panels(table),
        ),
        Figure(
            name="ensemble-error",
            title="How much is missing with one expert?",
            how_to_read="Norm of the difference between the two outputs over the norm of that with "
            "all: 0 where they are the same, 1 where as much is missing as there is." + _SAMPLE,
            limits="What is missing need not matter: how much worse the model predicts without "
            "it, `topk` measures.",
            chart=_by_layer(table, "relative_error", "relative error"),
            panels=_panels(table),
        ),
        Figure(
            name="ensemble-norm",
            title="Is the output with one expert as long?",
            how_to_read="Norm of the output with one expert over that with all. Below 1, the other "
            "experts add length; above, they take some of it back." + _SAMPLE,
            limits="Weights are left as they are, so one expert carries less mass than all: a "
            "ratio below 1 is partly that.",
            chart=_by_layer(table, "norm_ratio", "norm ratio"),
            panels=_panels(table),
        ),
    ]


def _headings(table: pd.DataFrame) -> pd.Series:
    """Form, and stack where there is more than one."""
    forms = table["form"].map(_FORMS)
    return table["stack"] + ": " + forms if len(set(table["stack"])) > 1 else forms


def _panels(table: pd.DataFrame) -> Panels:
    layers = table["layer"].nunique()
    count = _headings(table).nunique()
    return Panels(count=count, minimum=max(220, 16 * layers), preferred=400, across=2)


def _by_layer(table: pd.DataFrame, measure: str, title: str) -> alt.FacetChart:
    frame = table[table["measure"] == measure].assign(heading=_headings(table))
    frame = frame.assign(one=frame["compared"].map(_COMPARED))
    order = frame["heading"].unique().tolist()
    x = alt.X("layer:O", title="layer")
    colour = alt.Color(
        "one:N",
        title=None,
        scale=alt.Scale(domain=list(_COMPARED.values()), range="category"),
        legend=alt.Legend(columns=2, symbolType="circle"),
    )
    scale = alt.Scale(zero=False)
    base = alt.Chart(frame)
    spread = base.mark_rule(opacity=0.6, tooltip=None).encode(
        x, alt.Y("median_low:Q", scale=scale), alt.Y2("median_high:Q"), colour
    )
    lines = base.mark_line(point=alt.OverlayMarkDef(size=30)).encode(
        x,
        alt.Y("median:Q", title=title, scale=scale),
        colour,
        tooltip=[
            label("stack", "stack"),
            label("layer", "layer"),
            label("one", "compared"),
            tip("median", title),
            tip("median_low", "95% interval, from"),
            tip("median_high", "to"),
            tip("mean", "mean"),
            tip("n_tokens", "tokens", ","),
            tip("n_documents", "documents", ","),
        ],
    )
    chart: alt.FacetChart = (
        alt.layer(spread, lines)
        .properties(height=170)
        .facet(facet=alt.Facet("heading:N", sort=order, header=alt.Header(title=None)))
        .resolve_axis(x="independent")
    )
    return chart
