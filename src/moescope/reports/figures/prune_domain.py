"""Figures of the analysis `prune-domain`: what is lost and saved with the experts of one domain."""

import altair as alt
import pandas as pd

from moescope.reports.marks import cell_numbers, label, matrix, tip
from moescope.reports.panels import Panels
from moescope.reports.registry import Figure, figures
from moescope.runs import Result

COLUMNS = {
    "choice": "By what experts were chosen: the routing of one domain, that of all the text "
    "(pooled), or at random; unpruned, the model as it is.",
    "chosen_for": "The domain that experts were chosen for; all = all the text.",
    "kept": "Experts that every layer keeps; the router chooses among them alone.",
    "draw": "Number of the random choice.",
    "domain": "Kind of text that the loss was measured on; all = every domain together.",
    "loss": "Negative log-likelihood, nats per token.",
    "difference, rise": "Loss minus that of the model as it is, on the same tokens.",
    "where": "own: on the domain that experts were chosen for; elsewhere: on all others together.",
    "versus_pooled": "The rise less that with as many experts chosen on all the text.",
    "versus_random": "The rise less the mean over the random choices.",
    "random_rise, random_least, random_most": "Mean, least and most over the random choices.",
    "selected_on": "Documents that experts were chosen on; losses are of the other half.",
    "coverage": "Share of the routing, of these documents, that went to experts that are kept.",
    "coverage_other_half": "The same on the other half of the documents.",
    "agreement": "Share of these experts that are also those of the other half.",
    "weight_bytes, weights_left": "Bytes of the weights, and their share of those with all "
    "experts: of the pruned copy; by counting where experts were only masked.",
    "timed_as": "What was measured: the model as it is, a pruned copy of it, or, where none could "
    "be had (short memory, or a router that rounding has choose otherwise), the model with experts "
    "masked, which are still in memory.",
    "active_parameters": "Parameters that a token meets on average.",
    "ratio": "Median over the rounds of the time to read a text over that of the model as it is.",
    "share": "Share of each domain's routing, in every layer, that asked for this size.",
}

_RISE = "rise of the loss (nats per token)"
_OWN, _POOLED = "chosen for this domain", "chosen on all the text"
_RANDOM = "random (mean, least and most)"
_ELSEWHERE = "chosen for this domain, loss elsewhere"


@figures(
    "prune-domain",
    title="The experts of one domain",
    question="If only the experts that a domain uses are kept, what is lost there and elsewhere?",
    columns=COLUMNS,
)
def draw(result: Result) -> list[Figure]:
    """Losses by size, choices against each other, domains against domains, and what is saved."""
    against, saving = result.tables["against"], result.tables["saving"]
    return [
        _loss(result.table, against, saving),
        _better(against),
        _matrix(result.table, saving),
        _saving(against, saving),
    ]


def _loss(losses: pd.DataFrame, against: pd.DataFrame, saving: pd.DataFrame) -> Figure:
    domains = against["chosen_for"].unique().tolist()
    frame = pd.concat(_series(losses, against))
    frame = frame[frame["heading"].isin(domains)]
    most = int(saving["num_experts"].iloc[0])
    return Figure(
        name="prune-domain-loss",
        title="What is lost with the experts of one domain?",
        how_to_read="One panel per domain. A dot is the rise of its loss over the model as it is, "
        "on the same tokens, with as many experts per layer as written below, of "
        f"{most}; the last colour is the rise on all other domains. Lines are 95% intervals over "
        "documents (none under 30 documents), for random choices the least and the most of them. "
        "Experts are chosen on other documents than the loss is measured on. The scale widens "
        "around zero.",
        limits="Nothing was trained after pruning, which would mend some of it. Experts are "
        "chosen layer by layer, by how the model as it is routes: another choice may lose less.",
        chart=_dots(frame, [_OWN, _POOLED, _RANDOM, _ELSEWHERE], _RISE, domains),
        panels=Panels(count=len(domains), across=2, minimum=max(190, 70 * frame["kept"].nunique())),
    )


def _series(losses: pd.DataFrame, against: pd.DataFrame) -> list[pd.DataFrame]:
    """Rises under common names, one frame per colour."""
    shown = against.assign(
        heading=against["chosen_for"], value=against["rise"], low=against["rise_low"]
    ).assign(high=against["rise_high"])
    own = shown[shown["where"] == "own"]
    random = own.assign(value=own["random_rise"], low=own["random_least"], high=own["random_most"])
    pooled = losses[losses["choice"] == "pooled"]
    pooled = pooled.assign(
        heading=pooled["domain"], value=pooled["difference"], low=pooled["difference_low"]
    ).assign(high=pooled["difference_high"])
    named = {
        _OWN: own,
        _POOLED: pooled,
        _RANDOM: random,
        _ELSEWHERE: shown[shown["where"] == "elsewhere"],
    }
    columns = ["heading", "kept", "value", "low", "high", "n_tokens", "n_documents"]
    return [frame[columns].assign(series=name) for name, frame in named.items() if len(frame)]


def _better(against: pd.DataFrame) -> Figure:
    own = against[against["where"] == "own"]
    domains = own["chosen_for"].unique().tolist()
    names = {
        "versus_pooled": "against a choice on all the text",
        "versus_random": "against random choices (mean)",
    }
    frames = [
        own.assign(
            heading=own["chosen_for"],
            series=text,
            value=own[name],
            low=own[f"{name}_low"],
            high=own[f"{name}_high"],
        )
        for name, text in names.items()
        if own[name].notna().any()
    ]
    frame = pd.concat(frames)
    return Figure(
        name="prune-domain-better",
        title="Is a choice for the domain better than another?",
        how_to_read="One panel per domain. A dot is the loss on it with experts chosen for it, "
        "less the loss with as many chosen in another way, on the same tokens, with its paired 95% "
        "interval over documents (none under 30 documents). Below zero, the choice for the domain "
        "is better. The scale widens around zero.",
        limits="Intervals are over documents, with the choices as they are: they do not say how "
        "other random choices, or experts chosen on other text, would do. They are not corrected "
        "for the number of comparisons.",
        chart=_dots(frame, list(names.values()), "difference (nats per token)", domains),
        panels=Panels(count=len(domains), across=2, minimum=max(190, 50 * frame["kept"].nunique())),
    )


def _dots(frame: pd.DataFrame, order: list[str], title: str, domains: list[str]) -> alt.FacetChart:
    """Values with intervals by size, series side by side, one panel per domain."""
    present = [name for name in order if name in set(frame["series"])]
    scale = alt.Scale(type="symlog", constant=0.3, nice=False, padding=8)
    ticks = [-10, -3, -1, -0.3, 0, 0.3, 1, 3, 10]
    x = alt.X("kept:O", title="experts kept per layer")
    offset = alt.XOffset("series:N", sort=present)
    colour = alt.Color(
        "series:N",
        title=None,
        scale=alt.Scale(domain=present, range="category"),
        legend=alt.Legend(columns=2, symbolType="circle"),
    )
    base = alt.Chart(frame)
    zero = base.mark_rule(style="reference", tooltip=None).encode(y=alt.datum(0))
    spread = base.mark_rule(opacity=0.6, tooltip=None).encode(
        x, alt.Y("low:Q", scale=scale), alt.Y2("high:Q"), colour, offset
    )
    points = base.mark_point(filled=True, opacity=1, size=38).encode(
        x,
        alt.Y("value:Q", title=title, scale=scale, axis=alt.Axis(values=ticks, format="~g")),
        colour,
        offset,
        tooltip=[
            label("heading", "domain"),
            label("series", "experts"),
            tip("kept", "kept per layer", "d"),
            tip("value", title),
            tip("low", "from"),
            tip("high", "to"),
            tip("n_tokens", "tokens", ","),
            tip("n_documents", "documents", ","),
        ],
    )
    chart: alt.FacetChart = (
        alt.layer(zero, spread, points)
        .properties(height=190)
        .facet(facet=alt.Facet("heading:N", sort=domains, header=alt.Header(title=None)))
        .resolve_axis(x="independent")
    )
    return chart


def _matrix(losses: pd.DataFrame, saving: pd.DataFrame) -> Figure:
    sizes = saving["kept"].tolist()[:-1]
    size, most = sizes[(len(sizes) - 1) // 2], int(saving["num_experts"].iloc[0])
    named = losses["chosen_for"].where(losses["choice"] == "domain", losses["choice"])
    rows = {"pooled": "all the text", "random": "random (mean)"}
    frame = losses.assign(chosen=named.replace(rows))[(losses["kept"] == size)]
    measured = ["n_tokens", "n_documents"]
    frame = frame.groupby(["chosen", "domain"], sort=False)[["difference", *measured]].mean()
    frame = frame.reset_index()
    highest = max(frame["difference"].max(), 1e-9)
    frame["strong"] = frame["difference"] > 0.55 * highest
    chosen, domains = frame["chosen"].unique().tolist(), frame["domain"].unique().tolist()
    x = alt.X("domain:N", sort=domains, title="loss measured on", axis=alt.Axis(labelAngle=0))
    y = alt.Y("chosen:N", sort=chosen, title="experts chosen for")
    colour = alt.Color(
        "difference:Q",
        title=_RISE,
        scale=alt.Scale(domain=[min(frame["difference"].min(), 0), highest], range="ramp"),
    )
    tooltip = [
        label("chosen", "experts chosen for"),
        label("domain", "loss measured on"),
        tip("difference", "rise of the loss"),
        tip("n_tokens", "tokens", ","),
        tip("n_documents", "documents", ","),
    ]
    cells = matrix(x, y, "difference", colour, tooltip)
    numbers = cell_numbers(x, y, "difference", ".2f", "strong")
    return Figure(
        name="prune-domain-matrix",
        title="What do the experts of one domain cost the others?",
        how_to_read=f"With {size} of {most} experts per layer: a row is the domain that they were "
        "chosen for, a column the text that the loss was measured on, a cell the rise of its loss "
        "over the model as it is. Where domains have experts of their own, the diagonal is lowest "
        "in its column.",
        limits="Columns differ in how much there is to lose: compare cells of one column. "
        "Intervals, and the other sizes, are in the table.",
        chart=alt.layer(*cells, *numbers, data=frame).properties(height=26 * len(chosen)),
        panels=Panels(minimum=max(320, 74 * len(domains)), preferred=96 * len(domains)),
    )


def _saving(against: pd.DataFrame, saving: pd.DataFrame) -> Figure:
    own, away = (against[against["where"] == where] for where in ("own", "elsewhere"))
    series = {
        "own domain": own.groupby("kept")["rise"].mean(),
        "own domain, random choice": own.groupby("kept")["random_rise"].mean(),
        "other domains": away.groupby("kept")["rise"].mean(),
    }
    order = [name for name, rises in series.items() if len(rises)]
    frames = [series[name].rename("rise").reset_index().assign(series=name) for name in order]
    full = int(saving["kept"].max())
    frames.append(pd.DataFrame({"kept": full, "rise": 0.0, "series": order}))
    columns = ["kept", "parameters", "weight_bytes", "weights_left", "active_parameters", "ratio"]
    frame = pd.concat(frames).merge(saving[columns], on="kept")
    row = saving.iloc[-1]
    x = alt.X(
        "weights_left:Q",
        title="bytes of the weights, against all experts",
        scale=alt.Scale(zero=False, padding=14),
        axis=alt.Axis(format="%", tickCount=5, grid=False),
    )
    y = alt.Y("rise:Q", title=_RISE, scale=alt.Scale(padding=10))
    colour = alt.Color(
        "series:N",
        title="loss on the",
        scale=alt.Scale(domain=order, range="category"),
        legend=alt.Legend(columns=3, symbolType="circle"),
    )
    base = alt.Chart(frame)
    points = base.mark_line(point=alt.OverlayMarkDef(size=40)).encode(
        x,
        y,
        colour,
        tooltip=[
            label("series", "loss on the"),
            tip("kept", "experts kept per layer", "d"),
            tip("rise", "rise of the loss"),
            tip("weight_bytes", "bytes of the weights", ".4~s"),
            tip("parameters", "parameters", ".4~s"),
            tip("ratio", "of the time with all", ".2f"),
        ],
    )
    text = base.transform_filter(f"datum.series == '{order[-1]}'").mark_text(
        dx=10, dy=-9, style="number", tooltip=None
    )
    return Figure(
        name="prune-domain-saving",
        title="What does it save?",
        how_to_read="A dot is a number of experts per layer, written beside it: what the weights "
        "weigh then against the rise of the loss, the mean over domains. Time is in the table "
        f"below ({row['repeats']} rounds of {row['tokens_per_pass']} random tokens on "
        f"{row['device']}, {row['threads']} threads, {row['dtype']}; of a pruned copy or, where "
        "timed_as says so, with experts masked): a token meets as many experts as before.",
        limits="A smaller model may be faster where memory is short, or where tokens are written "
        "one by one in large batches: not measured. Activations and caches are not counted.",
        chart=alt.layer(points, text.encode(x, y, alt.Text("kept:Q"))).properties(height=220),
        panels=Panels(minimum=300, preferred=560),
        table=saving,
    )
