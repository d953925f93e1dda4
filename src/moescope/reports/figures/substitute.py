"""Figures of the analysis `substitute`: what stands in for an expert, and what that costs."""

import altair as alt
import pandas as pd

from moescope.reports.marks import cell_numbers, label, matrix, tip
from moescope.reports.panels import Panels
from moescope.reports.registry import Figure, figures
from moescope.runs import Result

COLUMNS = {
    "source": "The expert that is taken out, layer and number; all: the mean over all of them, "
    "taken out one at a time.",
    "by, than": "What stands in for it: zero, nothing; mean, its mean output over the training "
    "documents; linear, a ridge map and no expert; best, of all experts of other layers behind an "
    "adapter; drawn, of some of them; random, of as many random experts with the down projections "
    "of these; same_layer, of others of its own layer.",
    "form": "Of the adapter: low_rank, layer_norm (full).",
    "draw": "Number of the draw of random experts; none: the mean over the draws.",
    "tuned": "Whether adapter or map was trained on the loss of the model afterwards.",
    "target": "The expert behind the adapter.",
    "candidates": "How many it was chosen from, by inner_fvu.",
    "inner_fvu": "FVU on tokens set aside within the training documents.",
    "fvu": "FVU of the outputs on the held-out documents.",
    "adapter_parameters": "Numbers that have to be kept for what stands in.",
    "underdetermined": "Whether the form has more freedom than the tokens can settle; a full "
    "adapter is fitted as a low-rank one then.",
    "domain": "Kind of text; all = every domain together.",
    "loss": "Negative log-likelihood of the held-out documents, nats per token.",
    "difference": "Loss minus that of the model as it is, or of what it is compared with, on the "
    "same tokens. Intervals are over documents; where random experts are compared with, also over "
    "what one more draw of them would cost.",
    "of_zero": "difference as a share of what zero-ablation costs; none where that costs nothing.",
    "least, most": "Of the difference from one draw of random experts.",
    "p_value, p_corrected": "Of no difference, two-sided over documents; of random experts, of "
    "what is compared being one more draw of them; by Holm's correction among the comparisons of "
    "the mean, and among those of single experts.",
    "verdict": "better or worse: p_corrected below 0.05; open: neither; nothing under 30 documents "
    "or two draws.",
    "removed": "Experts that are taken out together.",
    "parameters": "Theirs.",
    "saved, saved_share": "Parameters of experts that go minus those that have to be kept "
    "instead; as a share of those of all routed experts.",
    "rise": "Rise of the loss as a share of the loss of the model as it is.",
    "sure": "As removed, for the upper end of the interval of the rise.",
    "next_tried": "Least number of experts that was tried with which the rise is above.",
}

_WORDS = {
    "zero": "nothing",
    "mean": "its mean output",
    "linear": "a linear map",
    "best": "best of other layers",
    "drawn": "drawn from other layers",
    "random": "random, of as many",
    "same_layer": "own layer",
}
_FORMS = {"layer_norm": ", full", "low_rank": "", "": ""}
_RISE = "change of the loss (nats per token)"


@figures(
    "substitute",
    title="Experts of other layers as substitutes",
    question="Can an expert of another layer do the work of one that is taken out?",
    columns=COLUMNS,
)
def draw(result: Result) -> list[Figure]:
    """Cost of each stand-in, of each for every expert, and of taking out several together."""
    table = _named(result.table)
    return [_loss(table), _experts(table), _curve(_named(result.tables["curve"]))]


def _named(table: pd.DataFrame) -> pd.DataFrame:
    """With a name of what stands in."""
    names = table["by"].map(_WORDS) + table["form"].map(_FORMS)
    if "tuned" in table:
        names += table["tuned"].map({True: ", tuned", False: ""})
    return table.assign(stand_in=names)


def _loss(table: pd.DataFrame) -> Figure:
    pooled = table[table["source"] == "all"]
    means, draws = pooled[pooled["draw"].isna()], pooled[pooled["draw"].notna()]
    domains, order = means["domain"].unique().tolist(), means["stand_in"].unique().tolist()
    y = alt.Y("stand_in:N", sort=order, title=None)
    x = alt.X("difference:Q", title=_RISE, axis=alt.Axis(tickCount=4))
    base = alt.Chart(pd.concat([means, draws]))
    mean = base.transform_filter("!isValid(datum.draw)")
    tooltip = [
        label("stand_in", "stands in"),
        label("domain", "domain"),
        tip("difference", "change of the loss", "+.4f"),
        tip("difference_low", "95% interval, from", "+.4f"),
        tip("difference_high", "to", "+.4f"),
        tip("fvu", "held-out FVU"),
        tip("candidates", "chosen from", "d"),
        tip("n_tokens", "tokens", ","),
        tip("n_documents", "documents", ","),
    ]
    zero = base.mark_rule(style="reference", tooltip=None).encode(x=alt.datum(0))
    spread = mean.mark_rule(opacity=0.6, tooltip=None).encode(
        alt.X("difference_low:Q"), y, alt.X2("difference_high:Q")
    )
    points = mean.mark_point(filled=True, opacity=1, size=46).encode(x, y, tooltip=tooltip)
    each = base.transform_filter("isValid(datum.draw)").mark_tick(
        thickness=1.5, size=9, tooltip=None
    )
    chart = (
        alt.layer(zero, spread, each.encode(x, y), points)
        .properties(height=22 * len(order))
        .facet(facet=alt.Facet("domain:N", sort=domains, header=alt.Header(title=None)))
        .resolve_scale(x="independent")
    )
    experts = table[table["source"] != "all"]["source"].nunique()
    return Figure(
        name="substitute-loss",
        title="What does it cost to have something else in the place of an expert?",
        how_to_read=f"A dot is the change of the loss on held-out documents, the mean over "
        f"{experts} experts that are taken out one at a time, with its 95% interval over documents "
        "(none under 30). Random experts are chosen from as many as those drawn from "
        "other layers, so that these two may be compared; short bars are single draws of random "
        "experts. Tuned: adapter or map trained further on the loss of the model.",
        limits="The best of other layers had more to choose from than any random one. Intervals "
        "of dots overlap where differences are clear all the same, since all are measured on the "
        "same tokens: the table of comparisons says which are. About other experts than these "
        "nothing is said.",
        chart=chart,
        panels=Panels(count=len(domains), minimum=200, preferred=300, beside=190),
    )


def _experts(table: pd.DataFrame) -> Figure:
    frame = table[(table["source"] != "all") & (table["domain"] == "all")]
    frame = frame[frame["draw"].isna()]
    highest = max(float(frame["difference"].max()), 1e-9)
    frame = frame.assign(strong=frame["difference"] > 0.55 * highest)
    x = alt.X(
        "stand_in:N",
        sort=frame["stand_in"].unique().tolist(),
        title=None,
        axis=alt.Axis(labelAngle=0, labelOverlap=False, labelExpr="split(datum.label, ' ')"),
    )
    y = alt.Y("source:N", sort=frame["source"].unique().tolist(), title="expert taken out")
    low = min(float(frame["difference"].min()), 0)
    colour = alt.Color(
        "difference:Q",
        title=_RISE,
        scale=alt.Scale(domain=[low, highest], range="ramp"),
    )
    tooltip = [
        label("source", "expert taken out"),
        label("stand_in", "stands in"),
        label("target", "expert behind the adapter"),
        tip("difference", "change of the loss", "+.4f"),
        tip("difference_low", "95% interval, from", "+.4f"),
        tip("difference_high", "to", "+.4f"),
        tip("of_zero", "share of zero-ablation", ".0%"),
        tip("fvu", "held-out FVU"),
    ]
    cells = matrix(x, y, "difference", colour, tooltip)
    numbers = cell_numbers(x, y, "difference", ".3f", "strong")
    sources, kinds = frame["source"].nunique(), frame["stand_in"].nunique()
    return Figure(
        name="substitute-experts",
        title="Which experts can something else stand in for?",
        how_to_read="A row is an expert that is taken out, a column what stands in for it, a cell "
        "the change of the loss on held-out documents of all domains. Compare cells of one row: "
        "rows differ in how much there is to lose.",
        limits="An expert that costs nothing to take out is no evidence that another does its "
        "work. Intervals are in the tooltips and the table.",
        chart=alt.layer(*cells, *numbers, data=frame).properties(height=max(60, 24 * sources)),
        panels=Panels(minimum=max(300, 66 * kinds), preferred=90 * kinds),
    )


def _curve(curve: pd.DataFrame) -> Figure:
    order = curve["stand_in"].unique().tolist()
    lines = curve["stand_in"] + curve["draw"].astype("string").fillna("")
    start = curve.assign(line=lines).drop_duplicates("line")[["stand_in", "line"]]
    frame = pd.concat(
        [start.assign(removed=0, saved_share=0.0, rise=0.0), curve.assign(line=lines)]
    )
    tried = sorted({*frame["removed"]})
    xs = [
        alt.X("removed:Q", title="experts taken out", axis=alt.Axis(values=tried, format="d")),
        alt.X(
            "saved_share:Q",
            title="parameters saved, of all routed experts",
            axis=alt.Axis(format="~%", tickCount=4),
        ),
    ]
    return Figure(
        name="substitute-curve",
        title="How many experts can go before the loss rises?",
        how_to_read="Experts are taken out together, each time the one that is expected to cost "
        "least by its error on training documents; a dot is the rise of the loss on held-out "
        "documents, with its 95% interval. Random experts have a line per draw. Right: the same "
        "against what it saves, with what has to be kept instead counted; left of zero more is "
        "kept than goes.",
        limits="Only the experts of the table above are taken out, and lines end once the loss "
        "has risen enough. Another order may let more go. The best of other layers has more "
        "experts to choose from than the others.",
        chart=alt.concat(*(_rises(frame, x, order) for x in xs)),
        panels=Panels(count=2, minimum=240, preferred=380, beside=76),
        table=curve[["stand_in", "draw", "removed", "experts", "saved", "rise"]],
    )


def _rises(frame: pd.DataFrame, x: alt.X, order: list[str]) -> alt.LayerChart | alt.FacetChart:
    colour = alt.Color(
        "stand_in:N",
        title="stands in",
        sort=order,
        scale=alt.Scale(domain=order, range="category"),
        legend=alt.Legend(columns=3),
    )
    y = alt.Y("rise:Q", title="rise of the loss", axis=alt.Axis(format="~%"))
    base = alt.Chart(frame)
    spread = base.mark_rule(opacity=0.5, tooltip=None).encode(
        x, alt.Y("rise_low:Q"), alt.Y2("rise_high:Q"), colour
    )
    line = base.mark_line(tooltip=None, strokeWidth=1.4).encode(
        x, y, colour, detail="line:N", order=alt.Order("removed:Q")
    )
    points = base.mark_point(filled=True, opacity=1, size=34).encode(
        x,
        y,
        colour,
        tooltip=[
            label("stand_in", "stands in"),
            label("experts", "experts taken out"),
            tip("rise", "rise of the loss", "+.2%"),
            tip("rise_low", "95% interval, from", "+.2%"),
            tip("rise_high", "to", "+.2%"),
            tip("saved", "parameters saved", ","),
        ],
    )
    return alt.layer(spread, line, points).properties(height=240)
