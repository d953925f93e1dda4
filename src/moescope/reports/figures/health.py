"""Figures of the analysis `health`: verdicts, runs, margins, and experts along one text."""

import altair as alt
import pandas as pd

from moescope.reports.figures.routing_concentration import by_layer, left_out, spread
from moescope.reports.marks import label, tip
from moescope.reports.panels import Panels
from moescope.reports.registry import Figure, figures
from moescope.runs import Result

COLUMNS = {
    "stack": "Decoder or encoder.",
    "layer": "The model's own layer number.",
    "check": "The failure that is looked for.",
    "measure": "What was measured, with its unit.",
    "value": "What it is in this layer.",
    "reference": "What it would be under the null, on average: see the page on `health`.",
    "reference_p95": "95th percentile of it under the null.",
    "low, high": "95% interval of the value over documents; for an expert never used, 0 and three "
    "over the tokens, counted as independent ones.",
    "p_corrected": "How often the null does as much, times the tests of the check (Bonferroni).",
    "state": "no sign, sign, or cannot tell.",
    "verdict": "The same with what was seen, or what is missing.",
    "switch_rate": "Part of a token's experts that the next token of the passage does not use.",
    "switch_shuffled": "The same where the tokens of each passage are shuffled.",
    "switch_independent": "The same if every token chose by the shares of the layer alone.",
    "margin": "Lowest logit of a chosen expert less the highest of one not chosen, mean.",
    "margin_p05 ... margin_p95": "Percentiles of it over tokens.",
    "negative_margins": "Part of the tokens where something else than the logit decided.",
    "mean_run": "Tokens in a row that have the expert, on average.",
    "shuffled, independent": "The same in shuffled passages; and 1 / (1 - share).",
    "best, worst": "Mean over the best- and the worst-predicted tenth of the tokens of each "
    "passage; difference is worst less best.",
    "position": "Place in the document that is shown.",
}
_STATES = {"no sign": "circle", "sign": "triangle-up", "cannot tell": "square"}


@figures(
    "health",
    title="Health",
    question="Does the routing show a known failure: unbalanced, dead, blind or undecided?",
    columns=COLUMNS,
)
def draw(result: Result) -> list[Figure]:
    """Verdicts, switch rates, runs, margins and one text, stack by stack."""
    stacks = result.table["stack"].unique().tolist()
    drawn = []
    for stack in stacks:
        tables = {name: table[table["stack"] == stack] for name, table in result.tables.items()}
        chosen = tables["layers"][tables["layers"]["margin_p50"].notna()]
        found = [_verdicts(tables["health"])]
        if not chosen.empty:
            found += [_switches(chosen), _runs(tables["runs"]), _margins(chosen)]
        found.append(_along(tables["along"]))
        drawn += [figure.of_stack(stack) if len(stacks) > 1 else figure for figure in found]
    return drawn


def _verdicts(rows: pd.DataFrame) -> Figure:
    x, y = (
        alt.X("layer:O", title="layer"),
        alt.Y("check:N", title=None, sort=None, scale=alt.Scale(paddingOuter=0.8)),
    )
    tooltip = [
        label("check", "check"),
        label("layer", "layer"),
        label("verdict", "verdict"),
        label("measure", "measure"),
        tip("value", "value", ".4~g"),
        tip("reference", "under the null", ".4~g"),
        tip("p_corrected", "p, corrected", ".3~g"),
        tip("n_documents", "documents", ","),
    ]
    colours = alt.Scale(domain=list(_STATES), range="category")
    frame = rows.assign(short=rows["value"].map("{:.3g}".format))
    base = alt.Chart(frame)
    points = base.mark_point(filled=True, size=110, opacity=1).encode(
        x,
        y,
        alt.Color("state:N", title=None, scale=colours),
        alt.Shape(
            "state:N",
            title=None,
            scale=alt.Scale(domain=list(_STATES), range=list(_STATES.values())),
        ),
        tooltip=tooltip,
    )
    numbers = base.mark_text(style="number", dy=15, tooltip=None).encode(x, y, alt.Text("short:N"))
    columns = ["layer", "check", "verdict", "measure", "value", "reference", "low", "high"]
    return Figure(
        name="health-verdicts",
        title="Which known failures does the routing show?",
        how_to_read="A mark is the verdict of a check in a layer: circle, no sign; triangle, a "
        "sign; square, the data cannot tell. Below it stands what was measured. The tooltip and "
        "the table say what was seen, against which null.",
        limits="A sign is not yet a fault, nor its absence health: it says that chance does not "
        "explain what was seen on this text (of the two blind checks: that chance does, and hides "
        "little); how large it is, the numbers say. The last two checks "
        "are no failures by themselves: words differ, and so does what they need.",
        chart=alt.layer(points, numbers).properties(height=alt.Step(46)),
        panels=Panels(
            minimum=max(260, 44 * frame["layer"].nunique()),
            preferred=max(360, 70 * frame["layer"].nunique()),
            beside=140,
        ),
        table=rows[[*columns, "p_corrected", "n_tokens", "n_documents"]].reset_index(drop=True),
    )


_RATES = {
    "switch_rate": "as it is",
    "switch_shuffled": "passages shuffled",
    "switch_independent": "independent tokens",
}


def _switches(layers: pd.DataFrame) -> Figure:
    long = layers.melt(
        ["layer", "switch_low", "switch_high", "n_tokens", "n_documents"],
        list(_RATES),
        "text",
        "rate",
    ).replace({"text": _RATES})
    colour = alt.Color(
        "text:N", title=None, scale=alt.Scale(domain=list(_RATES.values()), range="category")
    )
    x, scale = alt.X("layer:O", title="layer"), alt.Scale(zero=False)
    percent = alt.Axis(format="%")
    base = alt.Chart(long)
    own = f"datum.text == '{_RATES['switch_rate']}'"
    limits = base.transform_filter(own).mark_rule(opacity=0.6, tooltip=None)
    lines = base.mark_line(point=alt.OverlayMarkDef(size=30)).encode(
        x,
        alt.Y(
            "rate:Q", title="experts that the next token does not use", axis=percent, scale=scale
        ),
        colour,
        tooltip=[
            label("layer", "layer"),
            label("text", "text"),
            tip("rate", "switch rate", ".1%"),
            tip("n_tokens", "tokens", ","),
            tip("n_documents", "documents", ","),
        ],
    )
    return Figure(
        name="health-switches",
        title="How often do experts change from one token to the next?",
        how_to_read="The share of a token's experts that the next token of the same passage does "
        "not use, with its 95% interval over documents, beside the same in shuffled passages and "
        "for tokens that choose independently by the shares of the layer. Below the shuffled line, "
        "neighbours are more alike than other tokens of the same passage.",
        limits="Neighbours may share experts because they are alike as words or because the router "
        "follows the context: this does not tell which.",
        chart=alt.layer(
            limits.encode(x, alt.Y("switch_low:Q", scale=scale), alt.Y2("switch_high:Q"), colour),
            lines,
        ).properties(height=230),
        panels=Panels(minimum=max(260, 28 * layers["layer"].nunique()), preferred=700),
    )


def _runs(runs: pd.DataFrame) -> Figure:
    frame = runs[runs["mean_run"].notna()]
    shown = spread(frame["layer"])
    frame = frame[frame["layer"].isin(shown)]
    frame = frame.assign(heading="layer " + frame["layer"].astype(str))
    limit = float(frame[["mean_run", "shuffled", "high"]].max().max())
    scale = alt.Scale(domain=[1, limit * 1.05], zero=False)
    x = alt.X("shuffled:Q", title="mean run if shuffled (tokens)", scale=scale)
    base = alt.Chart(frame)
    even = base.mark_line(style="reference", tooltip=None).encode(
        alt.X("shuffled:Q", scale=scale), alt.Y("shuffled:Q", scale=scale)
    )
    limits = base.mark_rule(opacity=0.6, tooltip=None, clip=True).encode(
        x, alt.Y("low:Q"), alt.Y2("high:Q")
    )
    points = base.mark_circle(size=40, opacity=0.9).encode(
        x,
        alt.Y("mean_run:Q", title="mean run (tokens)", scale=scale),
        tooltip=[
            label("layer", "layer"),
            label("expert", "expert"),
            tip("mean_run", "mean run"),
            tip("low", "95% interval, from"),
            tip("high", "to"),
            tip("shuffled", "shuffled"),
            tip("independent", "1 / (1 - share)"),
            tip("share", "share of tokens", ".1%"),
            tip("runs", "runs", ","),
        ],
    )
    return Figure(
        name="health-runs",
        title="Do experts stay longer than their share explains?",
        how_to_read="One dot is one expert: how many tokens in a row have it, with the 95% "
        "interval over documents, against the same with the tokens of each passage shuffled. Above "
        "the dashed line it stays longer; an expert of a larger share lies further right."
        + left_out(runs, shown),
        limits="Runs end where a passage ends, in the text and in the shuffled one alike. A mean "
        "hides whether a few runs are long or all a little longer.",
        chart=by_layer(
            alt.layer(even, limits, points).properties(height=200), [f"layer {n}" for n in shown]
        ),
        panels=Panels(count=len(shown), minimum=200, preferred=260),
    )


def _margins(layers: pd.DataFrame) -> Figure:
    x, base = alt.X("layer:O", title="layer"), alt.Chart(layers)
    title = "margin (logits)"
    whiskers = base.mark_rule(tooltip=None, opacity=0.6).encode(
        x, alt.Y("margin_p05:Q"), alt.Y2("margin_p95:Q")
    )
    boxes = base.mark_bar(style="bar-quiet", size=14).encode(
        x,
        alt.Y("margin_p25:Q", title=title),
        alt.Y2("margin_p75:Q"),
        tooltip=[
            label("layer", "layer"),
            tip("margin_p05", "5th percentile"),
            tip("margin_p25", "25th"),
            tip("margin_p50", "median"),
            tip("margin_p75", "75th"),
            tip("margin_p95", "95th"),
            tip("margin", "mean"),
            tip("margin_low", "95% interval of the mean, from"),
            tip("margin_high", "to"),
            tip("negative_margins", "below zero", ".1%"),
            tip("n_tokens", "tokens", ","),
        ],
    )
    medians = base.mark_tick(size=14, thickness=2, tooltip=None).encode(x, alt.Y("margin_p50:Q"))
    return Figure(
        name="health-margins",
        title="How clearly does the router decide?",
        how_to_read="Lowest logit of a chosen expert less the highest of one not chosen, over "
        "tokens: tick, median; box, the middle half; line, 5th to 95th percentile. Near zero, the "
        "last expert chosen might as well have been another.",
        limits="A unit of logits need not mean the same in every layer, nor in two models: "
        "where weights are not a softmax over logits, not even a ratio of weights. Margins below "
        "zero are tokens where a bias or a limit decided.",
        chart=alt.layer(whiskers, boxes, medians).properties(height=230),
        panels=Panels(minimum=max(260, 28 * layers["layer"].nunique()), preferred=700),
    )


def _along(along: pd.DataFrame) -> Figure:
    shown = spread(along["layer"])
    frame = along[along["layer"].isin(shown)]
    frame = frame.assign(heading="layer " + frame["layer"].astype(str))
    tokens, experts = int(frame["position"].max()) + 1, int(frame["expert"].max()) + 1
    axis = alt.Axis(values=list(range(0, tokens, 20)))
    cells = (
        alt.Chart(frame)
        .mark_rect()
        .encode(
            alt.X("position:O", title="token of the text", axis=axis),
            alt.Y("expert:O", title="expert", scale=alt.Scale(domain=list(range(experts)))),
            tooltip=[
                label("token", "token"),
                label("position", "position"),
                label("expert", "expert"),
                label("layer", "layer"),
            ],
        )
        .properties(height=alt.Step(max(3, min(12, 600 // experts))))
    )
    document = frame["document"].iloc[0]
    return Figure(
        name="health-along",
        title="Which experts does one text use, token by token?",
        how_to_read=f"The first {tokens} tokens of document {document}, from left to right; a cell "
        "is filled where the token uses the expert. Long bars are an expert that stays; a row "
        "without cells is an expert that this text does not use. Words are in the tooltip."
        + left_out(along, shown),
        limits="One text is an example: rates over all documents are in the figures above.",
        chart=by_layer(cells, [f"layer {n}" for n in shown]),
        panels=Panels(count=len(shown), minimum=360, preferred=400, across=2),
    )
