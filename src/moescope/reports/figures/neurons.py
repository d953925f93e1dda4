"""Figures of the analysis `neurons`: activity, selectivity, ablations."""

import altair as alt
import pandas as pd

from moescope.reports.marks import label, tip
from moescope.reports.panels import Panels
from moescope.reports.registry import Figure, figures
from moescope.runs import Result

COLUMNS = {
    "stack": "Decoder or encoder.",
    "layer": "The model's own layer number.",
    "active": "Part of the activations act(gate x) of routed tokens (act(up x) without gate) "
    "whose absolute value is above the threshold.",
    "active_low, active_high": "95% interval over documents.",
    "emitting": "The same part of what neurons emit: the activation times up.",
    "q05, q50, q95": "Quantiles of the absolute activation.",
    "neurons": "Neurons looked at; of an ablation, 0 for a whole expert.",
    "judged": "Of these, neurons of experts with at least 300 tokens in the sample.",
    "dead": "Of the judged neurons those that are active at no token.",
    "selectivity": "Mean over neurons of the largest difference between the mean absolute "
    "activation in one domain and that elsewhere, in standard deviations over tokens.",
    "null_mean, null_p95": "Mean and 95th percentile of it when documents are shuffled, each "
    "difference over its own standard error and times that of the domains as they are.",
    "selective": "Neurons whose difference for a domain is clear of the shuffles, corrected for "
    "all neurons and domains of the layer (maxT).",
    "difference": "Of a neuron: between its domain and elsewhere, in standard deviations. Of an "
    "ablation: rise of the loss, nats per token.",
    "z": "The same in standard deviations over the shuffles.",
    "firing": "Part of the tokens of its expert at which the neuron is active.",
    "norm": "Mean norm of what the neuron adds, before the weight of the router.",
    "reach": "Part of the tokens of the domain that are routed to the expert.",
    "same, other": "Gate rows: mean cosine of neurons of the same number in two experts, or of "
    "different numbers; activations: mean correlation at the same tokens.",
    "null_p95, p_value (agreement)": "Under 199 random numberings of the neurons.",
    "kind": "Ablated: the most selective neuron of a domain, the group of the most selective, or "
    "the whole expert that has most of these.",
    "choice": "selective; random, others of the same experts, or another expert; matched, others "
    "of the same norm, or the expert with the nearest share of the domain's tokens.",
    "text": "Text of the domain that the ablation was chosen for, of the others, or the contrast.",
    "excess": "Rise without the selective ones minus the rise without this control.",
    "position": "Place among the tokens of the capture.",
    "p_corrected": "Corrected p: of neurons within their layer, of layers for their number (Holm).",
}

_KINDS = {
    "neuron": "one neuron",
    "group": "a group of neurons",
    "expert": "a whole expert",
}
_CHOICES = {
    "selective": "the most selective",
    "random": "others at random",
    "matched": "matched others",
}
_MOST_NEURONS = 30


@figures(
    "neurons",
    title="Neurons",
    question="How active are single neurons, are they made for a kind of text, and do they matter?",
    columns=COLUMNS,
)
def draw(result: Result) -> list[Figure]:
    """Active share and selectivity by layer, domain means of selective neurons, ablations."""
    table = result.table
    drawn = [_active(table, result.tables["experts"])]
    if "selectivity" in table:
        drawn.append(_selectivity(table))
    if "selective" in result.tables:
        drawn.append(_domains(result.tables["selective"]))
    if "ablation" in result.tables:
        drawn.append(_ablation(result.tables["ablation"]))
    return drawn


def _by_stack(
    chart: alt.LayerChart | alt.FacetChart, table: pd.DataFrame
) -> alt.LayerChart | alt.FacetChart:
    """One panel per stack where there are two."""
    if len(set(table["stack"])) == 1:
        return chart
    facet = alt.Facet("stack:N", header=alt.Header(title=None))
    panels: alt.FacetChart = chart.facet(facet=facet).resolve_axis(x="independent")
    return panels


def _panels(table: pd.DataFrame) -> Panels:
    minimum = max(260, 18 * table["layer"].nunique())
    return Panels(count=table["stack"].nunique(), minimum=minimum, preferred=700)


def _active(table: pd.DataFrame, experts: pd.DataFrame) -> Figure:
    every = pd.concat([table.assign(what="layer"), experts.assign(what="expert")])
    for name, turned in (("", ""), ("_low", "_high"), ("_high", "_low")):
        every[f"silent{name}"] = 1 - every[f"active{turned}"]
    x = alt.X("layer:O", title="layer")
    scale = alt.Scale(zero=False, padding=8)
    axis = alt.Axis(format=".3~%")
    y = alt.Y("silent:Q", title="silent activations", scale=scale, axis=axis)
    tooltip = [
        label("layer", "layer"),
        tip("silent", "silent", ".3%"),
        tip("silent_low", "95% interval, from", ".3%"),
        tip("silent_high", "to", ".3%"),
        tip("q50", "median of the absolute activation"),
        tip("dead", "dead neurons", ","),
        tip("judged", "of so many", ","),
        tip("n_tokens", "tokens", ","),
        tip("n_documents", "documents", ","),
    ]
    base = alt.Chart(every)
    layers = base.transform_filter("datum.what == 'layer'")
    dots = base.transform_filter("datum.what == 'expert'").mark_circle(size=22, opacity=0.4)
    chart = alt.layer(
        dots.encode(x, y, tooltip=[label("expert", "expert"), *tooltip]),
        layers.mark_rule(opacity=0.6, tooltip=None).encode(
            x, alt.Y("silent_low:Q", scale=scale, axis=axis), alt.Y2("silent_high:Q")
        ),
        layers.mark_line(point=alt.OverlayMarkDef(size=36)).encode(x, y, tooltip=tooltip),
    ).properties(height=220)
    return Figure(
        name="neurons-active",
        title="How many neurons of an expert are silent at a token?",
        how_to_read="Part of the activations of routed tokens whose absolute value is not above "
        "the threshold: 1 minus the share of active ones in the table. The line is the layer with "
        "its 95% interval over documents (none under 30 documents); a pale dot is an expert. Note "
        "where the axis begins.",
        limits="Not silent is not the same as useful: with smooth nonlinearities almost every "
        "activation is above a small threshold, whatever it does.",
        chart=_by_stack(chart, table),
        panels=_panels(table),
    )


def _selectivity(table: pd.DataFrame) -> Figure:
    tested = table[table["selectivity"].notna()]
    x = alt.X("layer:O", title="layer")
    title = "mean largest difference (standard deviations)"
    top = alt.Y("selectivity:Q", title=title)
    tooltip = [
        label("layer", "layer"),
        tip("selectivity", "mean largest difference"),
        tip("selectivity_low", "95% interval, from"),
        tip("selectivity_high", "to"),
        tip("null_mean", "shuffled, mean"),
        tip("null_p95", "shuffled, 95th percentile"),
        tip("p_corrected", "p, corrected"),
        tip("selective_share", "selective neurons", ".1%"),
        tip("n_documents", "documents", ","),
    ]
    base = alt.Chart(tested)
    chart = alt.layer(
        base.mark_bar(style="null-band", tooltip=None).encode(x, alt.Y("null_p95:Q", title=title)),
        base.mark_rule(opacity=0.6, tooltip=None).encode(
            x, alt.Y("selectivity_low:Q", title=title), alt.Y2("selectivity_high:Q")
        ),
        base.mark_line(point=alt.OverlayMarkDef(size=36)).encode(x, top, tooltip=tooltip),
        base.mark_text(dy=-12, style="number", tooltip=None).encode(
            x, top, alt.Text("selective_share:Q", format=".0%")
        ),
    ).properties(height=220)
    return Figure(
        name="neurons-selectivity",
        title="Are neurons more active in one kind of text, beyond chance?",
        how_to_read="For every neuron the largest difference, over domains, between its mean "
        "absolute activation there and elsewhere, on tokens that its expert gets; the dot is the "
        "mean over the neurons of the layer with its 95% interval over documents. The grey bar "
        "reaches to the 95th percentile of the same with documents shuffled. Above a dot: the part "
        "of the neurons that are clear of the shuffles one by one, corrected for all of the layer.",
        limits="A difference between domains may be one of vocabulary, format or length of the "
        "documents; it does not say that the neuron matters to the prediction.",
        chart=_by_stack(chart, tested),
        panels=_panels(tested),
    )


def _domains(selective: pd.DataFrame) -> Figure:
    rank = (selective["difference"] * selective["reach"]).sort_values(ascending=False).index
    chosen = selective.loc[rank[:_MOST_NEURONS]]
    names = chosen["stack"].where(chosen["stack"] != "decoder", "").str.slice(0, 1)
    names += chosen[["layer", "expert", "neuron"]].astype(str).agg(" / ".join, axis=1)
    frame = chosen.assign(named=names.str.strip())
    means = frame.filter(regex="^mean_").columns.tolist()
    frame[means] = frame[means].div(frame[means].max(axis=1), axis=0)
    long = frame.melt(
        ["named", "domain", "difference", "reach", "p_corrected"], means, "text", "part"
    )
    long["text"] = long["text"].str.removeprefix("mean_")
    order = frame.sort_values(["domain", "difference"], ascending=[True, False])["named"].tolist()
    scale = alt.Scale(domain=[0, 1], range="ramp", interpolate="rgb")
    legend = alt.Legend(format="%", values=[0, 0.5, 1])
    chart = (
        alt.Chart(long)
        .mark_rect()
        .encode(
            alt.X("named:N", title="layer / expert / neuron", sort=order).axis(
                labelAngle=-90, labelOverlap=False
            ),
            alt.Y("text:N", title=None),
            alt.Color(
                "part:Q",
                title="mean absolute activation, of its highest",
                scale=scale,
                legend=legend,
            ),
            tooltip=[
                label("named", "layer / expert / neuron"),
                label("text", "text"),
                tip("part", "mean, of its highest", ".0%"),
                label("domain", "most selective for"),
                tip("difference", "difference (standard deviations)"),
                tip("reach", "part of the domain that it sees", ".1%"),
                tip("p_corrected", "p, corrected"),
            ],
        )
        .properties(height=alt.Step(26))
    )
    return Figure(
        name="neurons-domains",
        title="What kind of text are the most selective neurons active in?",
        how_to_read="A column is a neuron; the darker, the larger its mean absolute activation in "
        "the text of the row, against the row where it is largest. Columns stand in the order of "
        "the domain that they are most selective for. Chosen by the difference times the part of "
        f"the domain that comes to the expert: at most {_MOST_NEURONS}.",
        limits="These are the extremes of thousands, and on other text they will look less pure. "
        "Only tokens that were routed to the expert count. The table of tokens shows where in the "
        "text they are most active.",
        chart=chart,
        panels=Panels(minimum=max(300, 17 * len(frame)), preferred=760, beside=100),
    )


def _ablation(table: pd.DataFrame) -> Figure:
    frame = table[table["text"] != "own - others"]
    texts = {"own": "its own text", "others": "other text"}
    frame = frame.assign(
        heading=frame["kind"].map(_KINDS) + ", " + frame["text"].map(texts),
        chosen=frame["choice"].map(_CHOICES),
    )
    order = frame["heading"].unique().tolist()
    x = alt.X("domain:N", title="domain of the neurons").axis(labelAngle=0)
    offset = alt.XOffset("chosen:N", sort=list(_CHOICES.values()))
    scale = alt.Scale(type="symlog", constant=0.002, padding=6)
    axis = alt.Axis(values=[-1, -0.1, -0.01, 0, 0.01, 0.1, 1], format="~g")
    colour = alt.Color(
        "chosen:N",
        title=None,
        scale=alt.Scale(domain=list(_CHOICES.values()), range="category"),
        legend=alt.Legend(columns=3, symbolType="circle"),
    )
    base = alt.Chart(frame)
    spread = base.mark_rule(opacity=0.6, tooltip=None).encode(
        x,
        alt.Y("difference_low:Q", title="rise of the loss", scale=scale, axis=axis),
        alt.Y2("difference_high:Q"),
        colour,
        offset,
    )
    dots = base.mark_point(filled=True, opacity=1, size=38).encode(
        x,
        alt.Y("difference:Q", title="rise of the loss", scale=scale, axis=axis),
        colour,
        offset,
        tooltip=[
            label("domain", "domain of the neurons"),
            label("heading", "ablated, and text"),
            label("chosen", "choice"),
            tip("difference", "rise of the loss", ".4f"),
            tip("difference_low", "95% interval, from", ".4f"),
            tip("difference_high", "to", ".4f"),
            tip("excess", "selective minus this", ".4f"),
            tip("n_tokens", "predictions", ","),
            tip("n_documents", "documents", ","),
        ],
    )
    chart = (
        alt.layer(spread, dots)
        .properties(height=170)
        .facet(facet=alt.Facet("heading:N", sort=order, header=alt.Header(title=None)))
        .resolve_axis(x="independent")
    )
    return Figure(
        name="neurons-ablation",
        title="Does the text suffer without the neurons that are made for it?",
        how_to_read="Rise of the loss (nats per token, on a scale that widens around zero) when "
        "neurons or an expert add nothing: those of the domain below, and two controls. Of "
        "neurons, others of the same experts, at random or of the same norm; of an expert, others "
        "of its layer, at random or with the nearest share of the domain's tokens. On the text of "
        "the domain, and on all other text. Rules are 95% intervals over documents (none under 30 "
        "documents).",
        limits="Neurons were chosen by activation and not by loss, on other documents. What one "
        "neuron does others may do as well: no rise does not mean no function. Intervals are for "
        "one number at a time.",
        chart=chart,
        panels=Panels(count=len(order), minimum=260, preferred=400, across=2),
    )
