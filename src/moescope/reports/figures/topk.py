"""Figures of the analysis `topk`: the loss with fewer experts per token, and what they cost."""

import altair as alt
import pandas as pd

from moescope.reports.marks import label, tip
from moescope.reports.panels import Panels
from moescope.reports.registry import Figure, figures
from moescope.runs import Result

COLUMNS = {
    "layers": "Which layers are restricted: all at once, or the one of this number.",
    "weights": "What becomes of the weights of the experts that stay: as_is; same_mass, rescaled "
    "to the sum over all that the router chose; to_one, rescaled to the sum of one.",
    "k": "Routed experts per token, those of the largest weights; 0 leaves the shared expert "
    "alone, where there is one.",
    "domain": "Kind of text; all = every domain together.",
    "loss": "Negative log-likelihood, nats per token.",
    "difference": "Loss minus that of the model as it is, on the same tokens.",
    "active_parameters": "Parameters that a token meets on average, without the experts that are "
    "left out.",
    "seconds_per_token": "Median time of a forward pass over rows of random tokens, per token; "
    "experts that are left out are not computed.",
    "ratio": "Median over the rounds of that time over the time of the model as it is.",
    "mean_perplexity, median_perplexity": "Over documents, each exp(loss per token): as "
    "published, weights as they are.",
    "scaled": "mean_perplexity, 0 at the lowest of its domain and 1 at the highest: as published.",
}

_TREATMENTS = {
    "as_is": "weights as they are",
    "same_mass": "rescaled to the same sum",
    "to_one": "rescaled to the sum of one",
}
_MOST_LAYERS_K = 3


@figures(
    "topk",
    title="Fewer experts per token",
    question="How much worse does the model predict if only the k best experts of each token run?",
    columns=COLUMNS,
)
def draw(result: Result) -> list[Figure]:
    """Loss by domain, by layer and against cost; and the published plot."""
    most = result.table["k"].max()
    losses = result.table.assign(treatment=result.table["weights"].map(_TREATMENTS))
    drawn = [_loss(losses[losses["layers"] == "all"])]
    restricted = (losses["layers"] != "all") & (losses["k"] < most)
    alone = losses[restricted & (losses["domain"] == "all")]
    if not alone.empty:
        drawn.append(_layers(alone))
    drawn.append(_cost(result.tables["cost"]))
    published = result.tables["published"]
    if published.empty or published["k"].max() == 1:
        return drawn
    return [*drawn, _published(published)]


def _loss(frame: pd.DataFrame) -> Figure:
    domains = frame["domain"].unique().tolist()
    chart = (
        _dots(frame, alt.X("k:O", title="experts per token"))
        .properties(height=190)
        .facet(facet=alt.Facet("domain:N", sort=domains, header=alt.Header(title=None)))
        .resolve_axis(x="independent")
    )
    return Figure(
        name="topk-loss",
        title="How much worse is the prediction with fewer experts?",
        how_to_read="Every token keeps the k experts of the largest weights, in all layers at "
        "once. A dot is the rise of the loss over the model as it is, on the same tokens, with its "
        "95% interval over documents (none under 30 documents), on a scale that widens "
        "around zero. Colours that part say how much of "
        "the rise is due to the weights, not to the experts that are missing.",
        limits="The model was never trained to run like this: how well it could do after training "
        "with a smaller k is not measured. That the first expert costs most to lose does not mean "
        "that it knows most.",
        chart=chart,
        panels=Panels(count=len(domains), minimum=max(190, 34 * frame["k"].nunique())),
    )


def _layers(frame: pd.DataFrame) -> Figure:
    tried = sorted(frame["k"].unique())[:_MOST_LAYERS_K]
    headings = {k: f"{k} per token" for k in tried}
    shown = frame[frame["k"].isin(tried)]
    shown = shown.assign(layer=shown["layers"].astype(int), heading=shown["k"].map(headings))
    order = list(headings.values())
    chart = (
        _dots(shown, alt.X("layer:O", title="restricted layer"))
        .properties(height=190)
        .facet(facet=alt.Facet("heading:N", sort=order, header=alt.Header(title=None)))
        .resolve_axis(x="independent")
    )
    left_out = frame["k"].nunique() - len(tried)
    return Figure(
        name="topk-layers",
        title="Which layer misses its experts most?",
        how_to_read="One layer at a time is restricted, the others run as they are. A dot is the "
        "rise of the loss over all domains with its 95% interval over documents."
        + (f" The {left_out} larger numbers of experts are in the table." if left_out else ""),
        limits="The rises of single layers need not add up to that of all together: what one "
        "layer spoils, later ones may mend or make worse.",
        chart=chart,
        panels=Panels(
            count=len(order), minimum=max(220, 22 * shown["layer"].nunique()), preferred=420
        ),
    )


def _colour(treatments: pd.Series) -> alt.Color:
    present = [name for name in _TREATMENTS.values() if name in set(treatments)]
    return alt.Color(
        "treatment:N",
        title="experts that stay",
        scale=alt.Scale(domain=list(_TREATMENTS.values()), range="category"),
        legend=alt.Legend(columns=3, values=present),
    )


def _dots(frame: pd.DataFrame, x: alt.X) -> alt.LayerChart | alt.FacetChart:
    """Rise of the loss with intervals, treatments of the weights side by side."""
    offset = alt.XOffset("treatment:N", sort=list(_TREATMENTS.values()))
    scale = alt.Scale(type="symlog", constant=0.05)
    y = alt.Y(
        "difference:Q",
        title="rise of the loss (nats per token)",
        scale=scale,
        axis=alt.Axis(values=[-1, -0.1, 0, 0.1, 0.3, 1, 3, 10], format="~g"),
    )
    colour = _colour(frame["treatment"])
    base = alt.Chart(frame)
    spread = base.mark_rule(opacity=0.6, tooltip=None).encode(
        x, alt.Y("difference_low:Q", scale=scale), alt.Y2("difference_high:Q"), colour, offset
    )
    points = base.mark_point(filled=True, opacity=1, size=38).encode(
        x,
        y,
        colour,
        offset,
        tooltip=[
            label("domain", "domain"),
            label("layers", "restricted layers"),
            tip("k", "experts per token", "d"),
            label("treatment", "weights"),
            tip("loss", "loss"),
            tip("difference", "rise"),
            tip("difference_low", "95% interval, from"),
            tip("difference_high", "to"),
            tip("n_tokens", "tokens", ","),
            tip("n_documents", "documents", ","),
        ],
    )
    return alt.layer(spread, points)


def _cost(cost: pd.DataFrame) -> Figure:
    names = {f"loss_{name}": text for name, text in _TREATMENTS.items() if f"loss_{name}" in cost}
    kept = [name for name in cost.columns if name not in names]
    long = cost.melt(kept, list(names), "treatment", "loss").replace({"treatment": names})
    long["milliseconds"] = 1e3 * long["seconds_per_token"]
    panels = {
        "active_parameters": alt.X(
            "active_parameters:Q",
            title="parameters that a token meets",
            scale=alt.Scale(zero=False, padding=14),
            axis=alt.Axis(format="~s", tickCount=4, grid=False),
        ),
        "ratio": alt.X(
            "ratio:Q",
            title="time to read a text, against all experts",
            scale=alt.Scale(zero=False, padding=14),
            axis=alt.Axis(format="%", tickCount=4, grid=False),
        ),
    }
    row = cost.iloc[-1]
    return Figure(
        name="topk-cost",
        title="What do fewer experts save?",
        how_to_read="A dot is a number of experts per token, written beside it, against the "
        "parameters that a token meets on average and the time of a forward pass; experts that are "
        "left out are not computed. Times are medians over rounds, each against the model as it is "
        f"in the same round ({row['repeats']} rounds of {row['tokens_per_pass']} random tokens on "
        f"{row['device']}, {row['threads']} threads, {row['dtype']}; with all experts "
        f"{1e3 * row['seconds_per_token']:.3g} ms per token). Down and to the left is better.",
        limits="This is the speed of reading a text on this machine, not of writing one token "
        "after the other, and of this implementation. All experts stay in memory.",
        chart=alt.concat(*(_against(long, x) for x in panels.values())),
        panels=Panels(count=len(panels), minimum=230, preferred=400, beside=84),
    )


def _against(long: pd.DataFrame, x: alt.X) -> alt.LayerChart | alt.FacetChart:
    y = alt.Y("loss:Q", title="loss (nats per token)", scale=alt.Scale(zero=False, padding=12))
    colour = _colour(long["treatment"])
    base = alt.Chart(long)
    return alt.layer(
        base.mark_line(strokeWidth=1.2, opacity=0.7, tooltip=None).encode(
            x, y, colour, order=alt.Order("k:Q")
        ),
        base.mark_point(filled=True, opacity=1, size=38).encode(
            x,
            y,
            colour,
            tooltip=[
                tip("k", "experts per token", "d"),
                label("treatment", "weights"),
                tip("loss", "loss"),
                tip("active_parameters", "parameters met", ".4~s"),
                tip("milliseconds", "milliseconds per token", ".3~r"),
                tip("ratio", "of the time with all", ".2f"),
            ],
        ),
        base.transform_filter(f"datum.treatment == '{long['treatment'].iloc[-1]}'")
        .mark_text(dx=8, dy=-9, style="number", tooltip=None)
        .encode(x, y, alt.Text("k:Q")),
    ).properties(height=220)


def _published(published: pd.DataFrame) -> Figure:
    colour = alt.Color("domain:N", scale=alt.Scale(range="category"), legend=alt.Legend(columns=4))
    chart = (
        alt.Chart(published)
        .mark_line(point=alt.OverlayMarkDef(size=34))
        .encode(
            alt.X("k:O", title="experts per token"),
            alt.Y("scaled:Q", title="perplexity, 0 to 1 in every domain"),
            colour,
            tooltip=[
                label("domain", "domain"),
                tip("k", "experts per token", "d"),
                tip("mean_perplexity", "mean perplexity of a document"),
                tip("scaled", "scaled"),
                tip("n_documents", "documents", ","),
            ],
        )
        .properties(height=200)
    )
    table = published.pivot_table(index="domain", columns="k", values="mean_perplexity")
    table.columns = [f"k = {k}" for k in table.columns]
    return Figure(
        name="topk-published",
        title="As published: what does the plot of MoE Lens show here?",
        how_to_read="The mean over documents of their perplexity, weights as they are, stretched "
        "in every domain so that its lowest value is 0 and its highest 1; the means themselves "
        "are in the table below. Drawn as in the study, for comparison with it.",
        limits="Stretching hides how much is lost: a rise of 1% and one of 100% look the same, and "
        "with two points every line is the same. The mean over documents is ruled by the few that "
        "are predicted worst.",
        chart=chart,
        panels=Panels(minimum=260, preferred=560),
        table=table.reset_index(),
    )
