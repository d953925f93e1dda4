"""Figures of the analysis `lens`: columns by layer, and the picture of one prompt."""

import altair as alt
import pandas as pd

from moescope.reports.marks import label, tip
from moescope.reports.panels import FIGURE_WIDTH, Panels
from moescope.reports.registry import Figure, figures
from moescope.runs import Result

COLUMNS = {
    "stack": "Decoder; nothing decodes the states of an encoder.",
    "layer": "The model's own layer number.",
    "column": "What is decoded with the model's own final norm and unembedding; r is the residual "
    "stream before the sparse block, S the shared expert.",
    "kind, rank": "The same for scripts: output, what the layer returns; residual, r; shared, "
    "r + S; top, r + S + the rank experts of the largest weights; added, r + the one of that rank; "
    "alone, that one by itself.",
    "translated": "Whether the state passed through a translator (tuned lens) first.",
    "domain": "Kind of text; all = every domain together.",
    "kl": "KL(final || column), nats: what is missing to the model's own prediction.",
    "agreement": "Share of positions at which the likeliest token is that of the model.",
    "loss": "Negative log-likelihood of the next token of the text, nats; not for "
    "encoder-decoders.",
    "kl_low, kl_high": "95% interval over documents; so with the others.",
    "position, token": "Place in the prompt, and the token there; a dot stands for a space.",
    "experts": "Experts in the column, with their weights.",
    "top_1, top_2, top_3, top_4, top_5": "The likeliest tokens; p_1 to p_5: their probabilities.",
}

_SHOWN = [("residual", 0), ("shared", 0), ("top", 1), ("output", 0), ("added", 1), ("alone", 1)]
_ANOTHER_BASIS = (
    "The final norm and unembedding were trained for the last layer alone: a large distance in "
    "early layers may mean that they write in another basis, not that they know nothing."
)
_TRANSLATED = (
    "States of the stream passed through translators first, which were trained on layer outputs, "
    "maybe on some of this text: other columns are outside what they were trained for."
)
_TICKS = [0, 0.1, 0.3, 1, 3, 10, 30]
_MOST_CELLS = 12_000
_CELL = 58
_LONGEST = 20
_COLOURS = {"its probability": "p", "exp(-KL): 1 = as the final one": "near"}


@figures(
    "lens",
    title="Lens",
    question="What would the model say after each layer, with and without each expert?",
    columns=COLUMNS,
)
def draw(result: Result) -> list[Figure]:
    """Divergence and agreement by layer; and every cell of a prompt."""
    drawn = [_layers(result.table)]
    if "prompt" in result.tables:
        drawn.append(_prompt(result.tables["prompt"], list(dict.fromkeys(result.table["column"]))))
    return drawn


def _layers(table: pd.DataFrame) -> Figure:
    overall = table[(table["domain"] == "all") & (table["status"] != "undefined")]
    kinds = pd.Series(list(zip(overall["kind"], overall["rank"], strict=True)), overall.index)
    frame = overall[kinds.isin(_SHOWN)]
    order = list(dict.fromkeys(frame["column"]))
    kl, agreement = ("KL to the final prediction (nats)", "same likeliest token")
    chart = alt.concat(
        _lines(frame, order, "kl", kl, alt.Scale(type="symlog", constant=0.05)),
        _lines(frame, order, "agreement", agreement, alt.Scale(domain=[0, 1])),
    )
    return Figure(
        name="lens-layers",
        title="Where does the prediction come from?",
        how_to_read="A dot is one layer, decoded as if the model ended there: r is the residual "
        "stream before the sparse block, S the shared expert, expert 1 the one of the largest "
        "weight. Left (or above): how far the prediction is from the final one, over the whole "
        "vocabulary, on a scale that widens around zero; right: how often the likeliest token is "
        "the same. Means over all positions with 95% intervals over documents (none under 30).",
        limits=(_TRANSLATED if table["translated"].any() else _ANOTHER_BASIS)
        + " All ranks of experts are in the table.",
        chart=chart,
        panels=Panels(
            count=2, minimum=max(240, 14 * frame["layer"].nunique()), preferred=400, beside=84
        ),
    )


def _lines(
    frame: pd.DataFrame, order: list[str], measure: str, title: str, scale: alt.Scale
) -> alt.LayerChart | alt.FacetChart:
    colour = alt.Color(
        "column:N",
        title=None,
        sort=order,
        scale=alt.Scale(domain=order, range="category"),
        legend=alt.Legend(columns=3, symbolType="stroke", symbolOpacity=1),
    )
    x = alt.X("layer:O", title="layer")
    base = alt.Chart(frame)
    low, high = alt.Y(f"{measure}_low:Q", scale=scale), alt.Y2(f"{measure}_high:Q")
    spread = base.mark_rule(opacity=0.5, tooltip=None).encode(x, low, high, colour)
    axis = alt.Axis(format="%") if measure == "agreement" else alt.Axis(values=_TICKS, format="~g")
    lines = base.mark_line(point=alt.OverlayMarkDef(size=30)).encode(
        x,
        alt.Y(f"{measure}:Q", title=title, scale=scale, axis=axis),
        colour,
        tooltip=[
            label("layer", "layer"),
            label("column", "decoded"),
            tip(measure, title),
            tip(f"{measure}_low", "95% interval, from"),
            tip(f"{measure}_high", "to"),
            tip("n_tokens", "positions", ","),
            tip("n_documents", "documents", ","),
        ],
    )
    return alt.layer(spread, lines).properties(height=240)


def _prompt(table: pd.DataFrame, order: list[str]) -> Figure:
    cells = table["layer"].nunique() * len(order)
    last = int(table["position"].max())
    first = max(0, last + 1 - max(1, _MOST_CELLS // cells))
    shown = table[table["position"] >= first]
    places = shown.drop_duplicates("position").set_index("position")["token"]
    frame = _cells(shown)
    at = alt.param(
        name="place",
        value=last,
        bind=alt.binding_select(
            options=places.index.tolist(),
            labels=[f"{place}: {token}" for place, token in places.items()],
            name="after token ",
        ),
    )
    colour_by = alt.param(
        name="colour",
        value="p",
        bind=alt.binding_radio(
            options=list(_COLOURS.values()), labels=list(_COLOURS), name="colour "
        ),
    )
    return Figure(
        name="lens-prompt",
        title="What would it say next, layer by layer and part by part?",
        how_to_read="One row is a layer, the last at the top, one column a part of it, decoded as "
        f"if the model ended there. A cell names the likeliest next token after "
        f'"{places.iloc[-1]}" (choose another place below), a dot stands for a space; the darker, '
        "the more probable. Tooltips hold experts with their weights, the five likeliest tokens "
        "and KL to the final prediction." + (f" Places from {first} on." if first else ""),
        limits="One prompt is an anecdote; means over a text say more. An expert by itself is "
        "decoded with the same norm, which makes a small output look as large as any other.",
        chart=_grid(frame, order).add_params(at, colour_by),
        panels=Panels(minimum=_CELL * len(order), preferred=1_400),
    )


def _cells(shown: pd.DataFrame) -> pd.DataFrame:
    """Short strings and few digits: a page holds every cell."""
    tokens = [shown[f"top_{place}"].str.slice(0, _LONGEST) for place in range(1, 6)]
    numbers = [shown[f"p_{place}"].map(" {:.3f}".format) for place in range(1, 6)]
    parts = [token + number for token, number in zip(tokens, numbers, strict=True)]
    return pd.DataFrame(
        {
            "position": shown["position"],
            "layer": shown["layer"],
            "column": shown["column"],
            "experts": shown["experts"],
            "token": tokens[0],
            "five": pd.concat(parts, axis=1).agg("  ".join, axis=1),
            "p": shown["p_1"].round(3),
            "kl": shown["kl"].round(3),
        }
    )


def _grid(frame: pd.DataFrame, order: list[str]) -> alt.LayerChart | alt.FacetChart:
    axis = alt.Axis(orient="top", labelAngle=0, labelLimit=_CELL + 20, labelOverlap=False)
    x = alt.X("column:N", title=None, sort=order, axis=axis)
    y = alt.Y("layer:O", title="layer", sort="descending")
    base = (
        alt.Chart(frame)
        .transform_filter("datum.position == place")
        .transform_calculate(shade="colour == 'p' ? datum.p : exp(-datum.kl)")
    )
    colour = alt.Color(
        "shade:Q",
        title="probability, or nearness",
        scale=alt.Scale(domain=[0, 1], range="ramp", interpolate="rgb"),
    )
    rects = base.mark_rect().encode(
        x,
        y,
        colour,
        tooltip=[
            label("layer", "layer"),
            label("column", "decoded"),
            label("experts", "experts (weights)"),
            label("five", "likeliest tokens"),
            tip("kl", "KL to the final prediction"),
        ],
    )
    limit = max(_CELL, (FIGURE_WIDTH - 60) // len(order)) - 6
    texts = [
        base.transform_filter(condition)
        .mark_text(style=style, limit=limit, tooltip=None)
        .encode(x, y, alt.Text("token:N"))
        for condition, style in (
            ("datum.shade <= 0.55", "number"),
            ("datum.shade > 0.55", "number-strong"),
        )
    ]
    return alt.layer(rects, *texts).properties(height=alt.Step(26))
