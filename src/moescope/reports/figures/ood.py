"""Figures of the analysis `ood`: adapters of one domain, tested on others."""

import altair as alt
import pandas as pd

from moescope.reports.marks import cell_numbers, label, matrix, tip
from moescope.reports.panels import Panels
from moescope.reports.registry import Figure, figures
from moescope.runs import Result

COLUMNS = {
    "quantity": "fvu, squared error on documents of the domain tested on over the squared distance "
    "of the expert's outputs there from their mean on the training documents of that domain: 1 is "
    "as good as this mean; loss, rise of the loss in nats per token.",
    "adapter": "real, the chosen target; random, the mean over random experts with its down "
    "projection; linear, a linear map and no expert; zero, the expert's output set to zero.",
    "trained_on": 'The domain; "all": as many tokens of all domains together; other domains '
    "(mean): the mean over adapters that were trained on each of the others.",
    "tested_on": 'Documents of this domain that the adapter was not trained on; "all": the mean '
    "over domains.",
    "value, fvu": "Mean over source experts, with its 95% limits over documents and adapters (in "
    "the table pairs: of one expert, over documents).",
    "difference": "From the adapter that was trained on the domain it is tested on, on the same "
    "documents.",
    "control": "Stands in the place of the target; the difference is that of the target behind an "
    "adapter less that of the control, below zero where the target is better.",
    "p_value, p_corrected": "Two-sided; after Holm's correction over the table of a quantity and "
    "adapter.",
    "n_sources": "Source experts.",
    "least_train, most_train, n_train": "Training tokens of an adapter, the same for all domains "
    "of a source expert.",
    "n_tokens, n_documents": "Tested on; of fvu the tokens of all source experts together.",
    "targets": "Experts that were chosen on the training documents of the two halves.",
}
_ADAPTERS = {
    "real": "target behind an adapter",
    "random": "random expert behind an adapter",
    "linear": "linear map",
}
_ZERO = "output set to zero"
_HEADINGS = [*_ADAPTERS.values(), _ZERO]


@figures(
    "ood",
    title="Adapters on other domains",
    question="Do adapters that were trained on one domain hold on the others?",
    columns=COLUMNS,
)
def draw(result: Result) -> list[Figure]:
    """Domain by domain: errors, what is lost against the domain's own, and losses."""
    differences = result.tables["differences"]
    domains = result.table["tested_on"].unique().tolist()
    found = [_errors(result.table), _differences(differences, domains)]
    if "loss" in set(result.table["quantity"]):
        found.append(_losses(result.table))
    return found


def _errors(table: pd.DataFrame) -> Figure:
    rows = table[table["quantity"] == "fvu"]
    rows = rows.assign(heading=rows["adapter"].map(_ADAPTERS))
    headings = [name for name in _ADAPTERS.values() if name in set(rows["heading"])]
    domains = rows["tested_on"].unique().tolist()
    high = min(max(float(rows["value"].max()), 1.0), 2.0)
    rows["strong"] = rows["value"] > 0.6 * high
    x = alt.X("tested_on:N", sort=domains, title="tested on", axis=alt.Axis(labelAngle=-35))
    y = alt.Y("trained_on:N", sort=[*domains, "all"], title="trained on")
    colour = alt.Color(
        "value:Q",
        title="held-out FVU",
        scale=alt.Scale(domain=[0, high], range="ramp", clamp=True),
        legend=alt.Legend(values=[0, 0.5, 1, 1.5], format=".1f"),
    )
    tooltip = [
        label("heading", "in the place of the expert"),
        label("trained_on", "trained on"),
        label("tested_on", "tested on"),
        tip("value", "held-out FVU"),
        tip("value_low", "from"),
        tip("value_high", "to"),
        tip("n_sources", "source experts", "d"),
        tip("n_tokens", "tokens", ",d"),
        tip("n_documents", "documents", ",d"),
    ]
    layers = [
        *matrix(x, y, "value", colour, tooltip),
        *cell_numbers(x, y, "value", ".2f", "strong"),
    ]
    chart = alt.layer(*layers, data=rows).properties(height=30 * (len(domains) + 1))
    return Figure(
        name="ood-fvu",
        title="Does an adapter of one domain hold on another?",
        how_to_read="A row is what was trained on, a column the documents it was tested on, a cell "
        "the fraction of variance unexplained there, the mean over source experts: 0 is the "
        "expert itself, 1 the mean of its outputs in the domain tested on. Every row had as many "
        "training tokens. Compare cells of one column: all of one column have the same "
        "denominator.",
        limits="Documents of a domain are of one kind and often one origin: what looks like a "
        "domain may be a style. Numbers are of the experts chosen, those with most tokens of every "
        "domain, not of all. Intervals are in the table.",
        chart=_side_by_side(chart, headings),
        panels=Panels(
            count=len(headings), minimum=44 * len(domains), preferred=190, across=3, beside=75
        ),
    )


def _differences(differences: pd.DataFrame, domains: list[str]) -> Figure:
    rows = differences[(differences["quantity"] == "fvu") & (differences["tested_on"] != "all")]
    rows = rows.assign(heading=rows["adapter"].map(_ADAPTERS))
    title = "FVU less that of the domain's own adapter"
    return Figure(
        name="ood-differences",
        title="What is lost against an adapter of the domain itself?",
        how_to_read="A dot is the FVU of what was trained on another domain (the colour), or on "
        "all of them, less the FVU of what was trained on the domain tested on (below), on the "
        "same documents, with its 95% interval over documents and adapters (none under 30 "
        "documents). Right of zero, another domain is worse.",
        limits="Intervals are not corrected for their number; the table has corrected p-values. "
        "There are two adapters per source expert and domain: with few source experts, "
        "differences go unseen.",
        chart=_dots(rows, "difference", title, domains),
        panels=_dot_panels(rows),
    )


def _losses(table: pd.DataFrame) -> Figure:
    rows = table[table["quantity"] == "loss"]
    rows = rows.assign(heading=rows["adapter"].map(_ADAPTERS | {"zero": _ZERO}))
    title = "rise of the loss (nats per token)"
    return Figure(
        name="ood-loss",
        title="And in the model: what does it cost on each domain?",
        how_to_read="A dot is the rise of the loss on documents of the domain below when what was "
        "trained on a domain (the colour) takes the place of one source expert, the mean over "
        "source experts, with its 95% interval over documents and adapters (none under 30 "
        "documents). Beside it: the output of the expert set to zero.",
        limits="One expert at a time, with nothing else trained. Losses of domains that hardly use "
        "an expert hardly change, whatever stands in for it.",
        chart=_dots(rows, "value", title, rows["tested_on"].unique().tolist()),
        panels=_dot_panels(rows),
    )


def _dots(rows: pd.DataFrame, value: str, title: str, domains: list[str]) -> alt.FacetChart:
    """Values with intervals by domain tested on, a colour for each domain trained on."""
    order = [*domains, *(name for name in rows["trained_on"].unique() if name not in domains)]
    headings = [name for name in _HEADINGS if name in set(rows["heading"])]
    y = alt.Y("tested_on:N", sort=domains, title="tested on")
    offset = alt.YOffset("trained_on:N", sort=order)
    colour = alt.Color(
        "trained_on:N",
        title="trained on",
        scale=alt.Scale(domain=order, range="category"),
        legend=alt.Legend(columns=6, symbolType="circle"),
    )
    base = alt.Chart(rows)
    zero = base.mark_rule(style="reference", tooltip=None).encode(x=alt.datum(0))
    spread = base.mark_rule(opacity=0.6, tooltip=None).encode(
        alt.X(f"{value}_low:Q"), y, colour, offset, x2=f"{value}_high:Q"
    )
    points = base.mark_point(filled=True, opacity=1, size=34).encode(
        alt.X(f"{value}:Q", title=title, axis=alt.Axis(tickCount=5)),
        y,
        colour,
        offset,
        tooltip=[
            label("heading", "in the place of the expert"),
            label("trained_on", "trained on"),
            label("tested_on", "tested on"),
            tip(value, title, ".3~g"),
            tip(f"{value}_low", "from", ".3~g"),
            tip(f"{value}_high", "to", ".3~g"),
            tip("n_sources", "source experts", "d"),
            tip("n_documents", "documents", ",d"),
        ],
    )
    chart = alt.layer(zero, spread, points).properties(height=62 * len(domains))
    return _side_by_side(chart, headings)


def _dot_panels(rows: pd.DataFrame) -> Panels:
    count = rows["heading"].nunique()
    return Panels(count=count, minimum=170, preferred=220, across=3, beside=60)


def _side_by_side(chart: alt.LayerChart | alt.FacetChart, headings: list[str]) -> alt.FacetChart:
    """One panel per kind of adapter; both axes mean the same in all of them."""
    facet = alt.Facet("heading:N", sort=headings, header=alt.Header(title=None))
    panels: alt.FacetChart = chart.facet(facet=facet).resolve_axis(x="independent")
    return panels
