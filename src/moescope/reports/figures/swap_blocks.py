"""Figures of the analysis `swap-blocks`: what pairs of blocks do in each other's place."""

import altair as alt
import pandas as pd

from moescope.reports.figures.swap_routing import distortion, heat_maps
from moescope.reports.marks import cell_numbers, label, matrix, tip
from moescope.reports.panels import Panels
from moescope.reports.registry import Figure, figures
from moescope.runs import Result

COLUMNS = {
    "swap": "The two layers, or layer.expert and layer.expert, that change places; none or "
    "baseline: the model as it is.",
    "stack": "Encoder or decoder, by the layers that are swapped or looked at.",
    "layer, other_layer": "The model's own numbers of the layers.",
    "distance": "Difference of these numbers.",
    "accuracy": "Share of questions whose answer is exact: at every token of it the right one is "
    "the most probable, given what stands before.",
    "accuracy_difference": "Accuracy minus that of the model as it is, on the same questions.",
    "loss": "Negative log-likelihood in nats: per token of text, or of the whole answer.",
    "loss_difference": "Loss minus that of the model as it is, on the same text or questions.",
    "accuracy_p_value, loss_p_value": "Of no difference, from the interval as if of a normal "
    "distribution.",
    "accuracy_p_corrected, loss_p_corrected": "After Holm's correction for the number of swaps.",
    "accuracy_verdict, loss_verdict": "harmless: a change by the margin or more is refuted (one-"
    "sided p < 0.025, corrected too); worse, better: it is not, and corrected p < 0.05; open: "
    "neither.",
    "status": "ok; few_documents, few_questions: under 30, no intervals of losses; unchanged: the "
    "model as it is; refused: the swap cannot be made, see reason.",
    "router_of": "Layer whose router (or block) stands at this layer meanwhile.",
    "count, share": "Routed (token, slot) pairs that go to the expert, and their part of all.",
    "side": "swapped: the swap is about this layer; before: the pass reaches it before the first "
    "swapped layer, so that nothing can change; after: it comes later.",
    "js_bits": "Jensen-Shannon divergence of the use of experts from that of the same router in "
    "the model as it is, on the same tokens.",
    "floor_bits": "Mean divergence between random halves of the documents or questions, in the "
    "model as it is.",
    "slope": "Least-squares slope over swaps, per layer of distance: of the accuracy lost, of the "
    "rise of the loss, or of the mean divergence over decoder layers.",
    "rank_correlation, p_value": "Of distance and change over pairs of layers, tested by permuting "
    "layers; p_corrected by Holm's correction for the number of measures.",
}

_MOST_COLOURS = 8
TITLES = {"accuracy": "change of accuracy", "loss": "change of the loss (nats)"}
_NUMBERS = {"accuracy": ".3f", "loss": ".2f"}


@figures(
    "swap-blocks",
    title="Blocks in each other's place",
    question="What happens if the sparse blocks of two layers change places?",
    columns=COLUMNS,
)
def draw(result: Result) -> list[Figure]:
    """Matrices of pairs, change against distance, and the routing of every layer."""
    table = result.table
    measures = [m for m in ("accuracy", "loss") if m in table]
    drawn = [_matrix(table, measure) for measure in measures]
    drawn.append(_distance(table, measures))
    drawn += heat_maps(result.tables["routing"], "swap-blocks")
    return [*drawn, distortion(result.tables["distortion"], "swap-blocks")]


def _matrix(table: pd.DataFrame, measure: str) -> Figure:
    """The study's Table 2."""
    frame = table.assign(change=table[f"{measure}_difference"])
    reach = max(float(frame["change"].abs().max()), 1e-9)
    sign = -1 if measure == "loss" else 1  # one colour for the worse
    frame["shade"] = sign * frame["change"]
    frame["strong"] = frame["shade"].abs() > 0.6 * reach
    layers = sorted({*frame["layer"], *frame["other_layer"]})
    x = alt.X("other_layer:O", sort=layers, title="layer", axis=alt.Axis(orient="top"))
    y = alt.Y("layer:O", sort=layers, title="layer")
    colour = alt.Color(
        "shade:Q",
        title=f"{TITLES[measure]}; brown is for the worse",
        scale=alt.Scale(domain=[-reach, reach], range="diverging", interpolate="rgb"),
        legend=alt.Legend(
            values=[-reach, 0, reach],
            labelExpr=f"datum.value == 0 ? '0' : format({sign} * datum.value, '+.2g')",
        ),
    )
    low, high = f"{measure}_difference_low", f"{measure}_difference_high"
    tooltip = [
        label("layer", "layer"),
        label("other_layer", "changes places with"),
        tip(measure, measure, ".4f"),
        tip("change", "change", "+.4f"),
        tip(low, "95% interval, from", "+.4f"),
        tip(high, "to", "+.4f"),
        label(f"{measure}_verdict", "verdict"),
        label("status", "status"),
        label("reason", "reason"),
    ]
    cells = matrix(x, y, measure, colour, tooltip)
    numbers = cell_numbers(x, y, measure, _NUMBERS[measure], "strong")
    return Figure(
        name=f"swap-blocks-{measure}",
        title=f"What is the {measure} with two blocks in each other's place?",
        how_to_read="A cell is the model with the sparse blocks of its row and its column "
        f"exchanged; on the diagonal, the model as it is. The number is the {measure}, the colour "
        "its change on the same text or questions. Intervals are in the next figure.",
        limits="Nothing was trained after the swap. That a swap costs little need not mean that "
        "the two blocks do the same: they may do little, or later layers may mend it.",
        chart=alt.layer(*cells, *numbers, data=frame).properties(height=30 * len(layers)),
        panels=Panels(minimum=max(260, 46 * len(layers)), preferred=80 * len(layers)),
    )


def _distance(table: pd.DataFrame, measures: list[str]) -> Figure:
    done = table[table["distance"].notna() & table["loss"].notna()]
    frames = [
        done.assign(
            heading=TITLES[measure],
            change=done[f"{measure}_difference"],
            low=done[f"{measure}_difference_low"],
            high=done[f"{measure}_difference_high"],
            verdict=done[f"{measure}_verdict"],
        )
        for measure in measures
    ]
    order = sorted(done["layer"].unique())
    x = alt.X("distance:O", title="distance of the two layers")
    offset = alt.XOffset("layer:O", sort=order)
    scale = alt.Scale(domain=order, range="category" if len(order) <= _MOST_COLOURS else "ramp")
    colour = alt.Color("layer:O", title="first of the two layers", scale=scale)
    base = alt.Chart(pd.concat(frames))
    zero = base.mark_rule(style="reference", tooltip=None).encode(y=alt.datum(0))
    spread = base.mark_rule(opacity=0.6, tooltip=None).encode(
        x, alt.Y("low:Q"), alt.Y2("high:Q"), colour, offset
    )
    points = base.mark_point(filled=True, opacity=1, size=38).encode(
        x,
        alt.Y("change:Q", title="change from the model as it is"),
        colour,
        offset,
        tooltip=[
            label("swap", "layers"),
            tip("change", "change", "+.4f"),
            tip("low", "95% interval, from", "+.4f"),
            tip("high", "to", "+.4f"),
            label("verdict", "verdict"),
        ],
    )
    chart = (
        alt.layer(zero, spread, points)
        .properties(height=210)
        .facet(
            facet=alt.Facet(
                "heading:N", sort=[TITLES[m] for m in measures], header=alt.Header(title=None)
            )
        )
        .resolve_scale(y="independent")
        .resolve_axis(x="independent")
    )
    return Figure(
        name="swap-blocks-distance",
        title="Does it cost more the further apart the layers are?",
        how_to_read="A dot is a pair of layers, its colour the first of them, with the 95% "
        "interval over documents or questions (none under 30). Zero is the model as it is.",
        limits="Pairs share layers, and far pairs always hold an early and a late one: distance "
        "and the layers themselves cannot be told apart by so few.",
        chart=chart,
        panels=Panels(
            count=len(measures), minimum=max(260, 12 * len(done)), preferred=520, across=2
        ),
    )
