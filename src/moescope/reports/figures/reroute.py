"""Figures of the analysis `reroute`: loss by budget, and against the other ways."""

import altair as alt
import pandas as pd

from moescope.reports.marks import label, tip
from moescope.reports.panels import Panels
from moescope.reports.registry import Figure, figures
from moescope.runs import Result

COLUMNS = {
    "way": "What becomes of tokens whose expert is not resident; see docs/rerouting.md.",
    "resident": "Number of resident experts, over all layers; the most used ones.",
    "of_experts": "Their share of all experts.",
    "threshold": "Inner FVU above which tokens are skipped instead.",
    "rerouted, skipped": "Shares of the (token, slot) pairs of the held-out documents, as the "
    "model as it is routes them.",
    "saved_parameters": "Parameters of the experts that are not resident.",
    "extra_parameters": "Parameters of adapters, maps or means.",
    "of_parameters": "Resident experts and what is extra, over all experts.",
    "difference": "Loss minus that of the model as it is, or of the other way.",
    "p_corrected, verdict": "After Holm's correction for all rows of the table.",
    "inner_fvu": "Error of the end of the route in the place of the expert, over the spread of its "
    "outputs, inside the training documents: what is chosen by.",
    "fvu, linear_fvu": "The same on held-out documents, and that of a linear map.",
}
_RISE = "rise of the loss (nats per token)"


@figures(
    "reroute",
    title="Rerouting to resident experts",
    question="What is lost if tokens of experts that are not at hand go to the most similar one?",
    columns=COLUMNS,
)
def draw(result: Result) -> list[Figure]:
    """Loss by budget, and paired differences."""
    return [_loss(result.table), _against(result.tables["against"], result.table)]


def _loss(table: pd.DataFrame) -> Figure:
    frame = table[table["domain"] == "all"].copy()
    limits = frame["threshold"].map("{:g}".format)
    frame["series"] = frame["way"].where(
        frame["threshold"].isna(), frame["way"] + ", threshold " + limits
    )
    order = frame["series"].unique().tolist()
    measured = ["difference", "difference_low", "difference_high", "rerouted", "skipped"]
    counts = ["resident", "of_experts", "of_parameters", "n_tokens", "n_documents"]
    frame = frame.groupby(["series", "resident"], sort=False, as_index=False).agg(
        dict.fromkeys([*measured, *counts[1:]], "mean") | {"draw": "count"}
    )
    x = alt.X("of_experts:O", title="resident experts", axis=alt.Axis(format=".0%", labelAngle=0))
    colour = alt.Color(
        "series:N",
        title=None,
        scale=alt.Scale(domain=order, range="category"),
        legend=alt.Legend(columns=3, symbolType="circle", labelLimit=240),
    )
    scale = alt.Scale(type="symlog", constant=0.1, nice=False, padding=8)
    base, offset = alt.Chart(frame), alt.XOffset("series:N", sort=order)
    zero = base.mark_rule(style="reference", tooltip=None).encode(y=alt.datum(0))
    spread = base.mark_rule(opacity=0.6, tooltip=None).encode(
        x, alt.Y("difference_low:Q", scale=scale), alt.Y2("difference_high:Q"), colour, offset
    )
    points = base.mark_point(filled=True, opacity=1, size=42).encode(
        x,
        alt.Y("difference:Q", title=_RISE, scale=scale),
        colour,
        offset,
        tooltip=[
            label("series", "way"),
            tip("resident", "resident experts", "d"),
            tip("difference", _RISE),
            tip("difference_low", "from"),
            tip("difference_high", "to"),
            tip("rerouted", "slots rerouted", ".1%"),
            tip("skipped", "slots skipped", ".1%"),
            tip("of_parameters", "parameters", ".1%"),
            tip("draw", "random choices", "d"),
            tip("n_tokens", "tokens", ","),
            tip("n_documents", "documents", ","),
        ],
    )
    return Figure(
        name="reroute-loss",
        title="What is lost with fewer resident experts?",
        how_to_read="Across, the share of all experts that are resident: the most used ones. A dot "
        "is the rise of the loss on held-out documents with one way to go on for the tokens of "
        "the others, with its 95% interval over documents; for random residents the mean over "
        "draws of value and limits. The scale widens around zero.",
        limits="Which experts are resident follows from how often they are used alone. What was "
        "trained are the adapters, one by one, on the model as it is.",
        chart=alt.layer(zero, spread, points).properties(height=280),
        panels=Panels(minimum=360, preferred=720),
        table=table[table["domain"] == "all"],
    )


def _against(against: pd.DataFrame, table: pd.DataFrame) -> Figure:
    of_experts = table.groupby("resident")["of_experts"].first()
    frame = against.assign(of_experts=against["resident"].map(of_experts))
    frame["heading"] = "against " + frame["versus"]
    headings = frame["heading"].unique().tolist()
    base = alt.Chart(frame)
    x = alt.X("of_experts:O", title="resident experts", axis=alt.Axis(format=".0%", labelAngle=0))
    zero = base.mark_rule(style="reference", tooltip=None).encode(y=alt.datum(0))
    scale = alt.Scale(type="symlog", constant=0.1, nice=False, padding=8)
    spread = base.mark_rule(opacity=0.6, tooltip=None).encode(
        x, alt.Y("difference_low:Q", scale=scale), alt.Y2("difference_high:Q")
    )
    points = base.mark_point(filled=True, opacity=1, size=38).encode(
        x,
        alt.Y("difference:Q", title="difference (nats per token)", scale=scale),
        tooltip=[
            label("versus", "against"),
            tip("resident", "resident experts", "d"),
            tip("difference", "difference"),
            tip("difference_low", "from"),
            tip("difference_high", "to"),
            tip("p_corrected", "p, corrected", ".2g"),
            tip("n_tokens", "tokens", ","),
            tip("n_documents", "documents", ","),
        ],
    )
    chart = (
        alt.layer(zero, spread, points)
        .properties(height=150)
        .facet(facet=alt.Facet("heading:N", sort=headings, header=alt.Header(title=None)))
        .resolve_axis(x="independent")
    )
    return Figure(
        name="reroute-against",
        title="Is the most similar expert of any layer better than other ways?",
        how_to_read="One panel per other way. A dot is the loss with tokens sent to the most "
        "similar resident expert of any layer, less that with the other way, on the same tokens, "
        "with its paired 95% interval over documents. Below zero, the most similar expert is "
        "better. The scale widens around zero.",
        limits="Intervals are over documents, and not corrected for the number of comparisons; "
        "the p-values in the table are.",
        chart=chart,
        panels=Panels(count=len(headings), across=3, minimum=190, preferred=260),
        table=against,
    )
