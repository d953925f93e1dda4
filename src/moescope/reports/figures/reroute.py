"""Figures of the analysis `reroute`: loss by budget, and against the other ways."""

import altair as alt
import pandas as pd

from moescope.reports.figures.clusters_losses import RISE, coloured, dots
from moescope.reports.marks import label, tip
from moescope.reports.panels import Panels
from moescope.reports.registry import Figure, figures
from moescope.runs import Result

COLUMNS = {
    "way": "What becomes of tokens whose expert is not resident; see docs/rerouting.md.",
    "resident": "Number of resident experts, over all layers; the most used ones.",
    "of_experts": "Their share of the experts that take part.",
    "threshold": "Inner FVU of a route above which tokens are skipped instead.",
    "rerouted, skipped": "Shares of the (token, slot) pairs that the model as it is routes to "
    "experts that take part, in the held-out documents.",
    "saved_parameters": "Parameters of the experts that are not resident.",
    "extra_parameters": "Parameters of adapters, maps or means.",
    "of_parameters": "Resident experts and what is extra, over all experts that take part.",
    "difference": "Loss minus that of the model as it is, or of the other way.",
    "least, most": "Of the difference, over the draws of random residents.",
    "p_corrected, verdict": "After Holm's correction for all rows of the table; of random "
    "residents, for other documents and for one more draw.",
    "inner_fvu": "Error of the end of the route in the place of the expert, over the spread of its "
    "outputs, inside the training documents: what is chosen by.",
    "fvu, linear_fvu": "The same on held-out documents, and that of a linear map.",
}


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
    rows = table[table["domain"] == "all"]
    several = rows.groupby("way")["threshold"].transform("nunique") > 1
    limits = rows["way"] + ", threshold " + rows["threshold"].map("{:g}".format)
    frame = rows.assign(series=rows["way"].mask(several, limits))
    order = frame["series"].unique().tolist()
    about = [
        label("series", "way"),
        tip("draw", "random choice", "d"),
        tip("resident", "resident experts", "d"),
        tip("rerouted", "slots rerouted", ".1%"),
        tip("skipped", "slots skipped", ".1%"),
        tip("of_parameters", "parameters", ".1%"),
    ]
    offset = alt.XOffset("series:N", sort=order)
    chart = dots(frame, RISE, about, [_resident(), offset, coloured("series", order)])
    return Figure(
        name="reroute-loss",
        title="What is lost with fewer resident experts?",
        how_to_read="Across, the share of experts that are resident: the most used ones. A dot is "
        "the rise of the loss on held-out documents with one way to go on for the tokens of the "
        "others, with its 95% interval over documents; of random residents one dot for each draw. "
        "The scale widens around zero.",
        limits="Which experts are resident follows from how often they are used alone. What was "
        "trained are the adapters, one by one, on the model as it is.",
        chart=chart.properties(height=280),
        panels=Panels(minimum=360, preferred=720),
        table=rows,
    )


def _against(against: pd.DataFrame, table: pd.DataFrame) -> Figure:
    of_experts = table.groupby("resident")["of_experts"].first()
    frame = against.assign(
        of_experts=against["resident"].map(of_experts), heading="against " + against["versus"]
    )
    headings = frame["heading"].unique().tolist()
    about = [
        label("versus", "against"),
        tip("resident", "resident experts", "d"),
        tip("least", "least over draws"),
        tip("most", "most over draws"),
        tip("p_corrected", "p, corrected", ".2g"),
    ]
    chart = (
        dots(frame, "difference (nats per token)", about, [_resident()])
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
        "the p-values in the table are. Of random residents the mean of their draws is compared, "
        "with an interval for one more draw.",
        chart=chart,
        panels=Panels(count=len(headings), across=3, minimum=190, preferred=260),
        table=against,
    )


def _resident() -> alt.X:
    axis = alt.Axis(format=".0%", labelAngle=0)
    return alt.X("of_experts:O", title="resident experts", axis=axis)
