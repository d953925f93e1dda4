"""Figures of the analysis `routing`: which experts are used, how much, and by which text."""

from collections.abc import Mapping

import altair as alt
import numpy as np
import pandas as pd

from moescope.reports.figures.routing_columns import COLUMNS
from moescope.reports.figures.routing_concentration import half, ranked_experts
from moescope.reports.figures.routing_pairs import coactivation, transitions
from moescope.reports.figures.routing_tokens import components, typical
from moescope.reports.marks import MISSING, diverging, label, matrix, tip
from moescope.reports.panels import Panels
from moescope.reports.registry import Figure, figures
from moescope.runs import Result

_USED = ["domain", "layer", "expert", "tokens", "share", "uniform", "low", "high"]
_MOST_SEPARATE_EXPERTS = 16
_MOST_DOMAIN_PAIRS = 12
_CLEAR = "p <= 0.05, corrected"


@figures(
    "routing",
    title="Routing",
    question="Which experts are used, how evenly, and does the kind of text decide?",
    columns=COLUMNS,
)
def draw(result: Result) -> list[Figure]:
    """Use of the experts, divergence between domains, pairs, tokens and logits, stack by stack."""
    stacks = result.table["stack"].unique().tolist() if "stack" in result.table else ["decoder"]
    drawn = []
    for stack in stacks:
        tables = {name: _of(stack, frame) for name, frame in result.tables.items()}
        named = len(stacks) > 1
        drawn += [figure.of_stack(stack) if named else figure for figure in _figures(tables)]
    return drawn


def _of(stack: str, table: pd.DataFrame) -> pd.DataFrame:
    return table[table["stack"] == stack] if "stack" in table else table


def _figures(tables: Mapping[str, pd.DataFrame]) -> list[Figure]:
    """Those of one stack; results of earlier versions hold the first three tables alone."""
    shares = tables["routing"]
    more = {name for name, table in tables.items() if not table.empty}
    drawn = [_shares(shares), _load(shares), _entropy(tables["layers"])]
    if "concentration" in more:
        drawn += [ranked_experts(shares), half(tables["concentration"])]
    if "divergence" in more:
        drawn.append(_divergence(tables["divergence"]))
    if "pca" in more:
        domains = [domain for domain in shares["domain"].unique() if domain != "all"]
        drawn.append(components(tables["pca"], tables["logits"], domains))
    if "coactivation" in more:
        drawn.append(coactivation(tables["coactivation"]))
    if "transitions" in more:
        drawn.append(transitions(tables["transitions"]))
    if "tokens" in more:
        drawn.append(typical(tables["tokens"]))
    return drawn


def _layer_axis() -> alt.Y:
    return alt.Y("layer:O", title="layer", sort="ascending")


def _shares(shares: pd.DataFrame) -> Figure:
    frame = shares.assign(times=shares["share"] / shares["uniform"])
    frame["log_times"] = np.log2(frame["times"].clip(lower=2.0**-6))
    tooltip = [
        label("domain", "domain"),
        label("layer", "layer"),
        label("expert", "expert"),
        tip("share", "share of tokens", ".1%"),
        tip("low", "95% interval, from", ".1%"),
        tip("high", "to", ".1%"),
        tip("uniform", "K/E", ".1%"),
        tip("times", "times K/E"),
        tip("tokens", "tokens", ","),
    ]
    times = "{'-2': '1/4', '-1': '1/2', '0': 'K/E', '1': '2x', '2': '4x'}[datum.value]"
    colour = diverging("log_times", "share of tokens against K/E", 2.0, times)
    cells = matrix(alt.X("expert:O", title="expert"), _layer_axis(), "log_times", colour, tooltip)
    domains = frame["domain"].unique().tolist()
    experts = frame["expert"].nunique()
    chart = (
        alt.layer(*cells, data=frame[[*_USED, "times", "log_times"]])
        .properties(height=alt.Step(22))
        .facet(facet=alt.Facet("domain:N", sort=domains, header=alt.Header(title=None)))
        .resolve_axis(x="independent")
    )
    return Figure(
        name="routing-shares",
        title="Which experts does each kind of text use?",
        how_to_read="One cell is one expert of one layer. Blue: used more than K/E, the share of "
        f"an even router; orange: used less; {MISSING}.",
        limits="A preferred expert need not know the domain: this shows where tokens go, not what "
        "the expert does with them.",
        chart=chart,
        panels=Panels(
            count=len(domains), minimum=max(200, 4 * experts), preferred=26 * experts + 60
        ),
    )


def _load(shares: pd.DataFrame) -> Figure:
    frame = shares[shares["domain"] == "all"]
    separate = frame["expert"].nunique() <= _MOST_SEPARATE_EXPERTS
    x: dict[str, object] = {"x": alt.X("layer:O", title="layer")}
    if separate:
        x["xOffset"] = alt.XOffset("expert:O", scale=alt.Scale(padding=0.3))
    percent = alt.Axis(format="%")
    tooltip = [
        label("layer", "layer"),
        label("expert", "expert"),
        tip("share", "share of tokens", ".1%"),
        tip("low", "95% interval, from", ".1%"),
        tip("high", "to", ".1%"),
        tip("uniform", "K/E", ".1%"),
    ]
    y = alt.Y("share:Q", title="share of tokens", axis=percent)
    base = alt.Chart(frame)
    even = (
        alt.Chart(frame.drop_duplicates("layer"))
        .mark_rule(style="reference", tooltip=None)
        .encode(
            alt.X("layer:O", title="layer", bandPosition=0),
            alt.Y("uniform:Q", title="share of tokens"),
            alt.X2("layer:O", bandPosition=1),
        )
    )
    spread = base.mark_rule(opacity=0.45, tooltip=None).encode(
        alt.Y("low:Q"), alt.Y2("high:Q"), **x
    )
    points = base.mark_circle(opacity=1, size=34).encode(y, tooltip=tooltip, **x)
    layers = [even, spread, points] if separate else [even, points]
    return Figure(
        name="routing-load",
        title="How unequal is the work of the experts?",
        how_to_read="One dot is one expert over all domains, "
        + ("with its 95% interval over documents; " if separate else "")
        + "the dashed line is K/E, an even load.",
        limits="An uneven load on this text is not a fault by itself: other text may use the "
        "quiet experts.",
        chart=alt.layer(*layers).properties(height=240),
        panels=Panels(minimum=max(260, 28 * frame["layer"].nunique()), preferred=760),
    )


_ENTROPIES = {
    "entropy_bits": "use of the experts, over all tokens",
    "router_entropy_bits": "router, one token at a time",
    "max_entropy_bits": "maximum: all experts alike",
}
_CONCENTRATION = {
    "experts_for_half": "experts that take half of the routing",
    "even_half": "half of the experts: an even load",
}


def _entropy(layers: pd.DataFrame) -> Figure:
    frame = layers.assign(even_half=np.ceil(layers["num_experts"] / 2))
    return Figure(
        name="routing-entropy",
        title="How concentrated is routing, layer by layer?",
        how_to_read="Left (or above): entropy in bits; below the maximum, some experts are used "
        "more than others. Right: how few experts take half of the routing.",
        limits="Low entropy of one token's router says that it is sure of itself, not that it is "
        "right.",
        chart=alt.concat(
            _lines(frame, _ENTROPIES, "entropy (bits)"),
            _lines(frame, _CONCENTRATION, "number of experts"),
        ).resolve_scale(color="independent", strokeDash="independent"),
        panels=Panels(count=2, minimum=230, preferred=400),
    )


def _lines(frame: pd.DataFrame, names: dict[str, str], title: str) -> alt.Chart:
    long = frame.melt("layer", list(names), "measure", "value").replace({"measure": names})
    order = list(names.values())
    key = alt.Legend(title=None, direction="vertical", columns=1, symbolType="stroke")
    dashes = [[1, 0]] * (len(order) - 1) + [[4, 3]]
    lines: alt.Chart = (
        alt.Chart(long)
        .mark_line(point=alt.OverlayMarkDef(size=30))
        .encode(
            alt.X("layer:O", title="layer"),
            alt.Y("value:Q", title=title, scale=alt.Scale(zero=True)),
            alt.Color("measure:N", scale=alt.Scale(domain=order, range="category"), legend=key),
            alt.StrokeDash("measure:N", scale=alt.Scale(domain=order, range=dashes), legend=key),
            tooltip=[label("layer", "layer"), label("measure", "measure"), tip("value", title)],
        )
        .properties(height=200)
    )
    return lines


def _divergence(divergence: pd.DataFrame) -> Figure:
    frame = divergence.assign(
        domains=divergence["domain_a"] + " / " + divergence["domain_b"],
        beyond=np.where(divergence["p_corrected"] <= 0.05, _CLEAR, "not clear"),
    )
    ranked = frame.groupby("domains")["excess"].mean().sort_values(ascending=False, kind="stable")
    order = ranked.index[:_MOST_DOMAIN_PAIRS].tolist()
    x = alt.X("layer:O", title="layer")
    top = alt.Y("js_bits:Q", title="divergence (bits)")
    base = alt.Chart(frame[frame["domains"].isin(order)])
    band = base.mark_bar(style="null-band", tooltip=None).encode(x, alt.Y("null_p95:Q"))
    line = base.mark_line(tooltip=None).encode(x, top)
    states = alt.Scale(domain=[_CLEAR, "not clear"], range=["circle", "cross"])
    points = base.mark_point(filled=True, size=40, opacity=1).encode(
        x,
        top,
        alt.Shape("beyond:N", title=None, scale=states),
        tooltip=[
            label("domains", "domains"),
            label("layer", "layer"),
            tip("js_bits", "divergence (bits)"),
            tip("null_mean", "shuffled, mean"),
            tip("null_p95", "shuffled, 95th percentile"),
            tip("p_value", "p"),
            tip("p_corrected", "p, corrected"),
            tip("n_tokens", "tokens a side", ","),
            tip("n_documents", "documents", ","),
        ],
    )
    left_out = len(ranked) - len(order)
    return Figure(
        name="routing-divergence",
        title="Do two domains use different experts, beyond chance?",
        how_to_read="The line is the Jensen-Shannon divergence between two domains; the grey bar "
        "reaches to the 95th percentile of the same number with documents shuffled, above which "
        "one in twenty rises by chance. Round marks are clear after correction for all layers "
        "and pairs."
        + (f" The {left_out} pairs with the least excess are in the table." if left_out else ""),
        limits="It does not say which expert makes the difference, nor that the difference "
        "matters to the model.",
        chart=alt.layer(band, line, points)
        .properties(height=130)
        .facet(facet=alt.Facet("domains:N", sort=order, header=alt.Header(title=None)))
        .resolve_axis(x="independent"),
        panels=Panels(count=len(order), minimum=210, preferred=240),
    )
