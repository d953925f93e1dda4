"""Figures of the analysis `attribute`: which experts carry a prediction, by two measures."""

import altair as alt
import pandas as pd

from moescope.reports.marks import MISSING, diverging, label, matrix, tip
from moescope.reports.panels import Panels
from moescope.reports.registry import Figure, figures
from moescope.runs import Result

COLUMNS = {
    "stack, layer, expert": "Which expert; layers have the model's own numbers.",
    "contribution": "What the expert adds to the logit of the answer directly, at the last token, "
    "with the scale of the final norm fixed; above the mean over the vocabulary. Mean over "
    "prompts.",
    "ablation_loss": "Rise of the negative log-likelihood of the answer, nats, when the expert "
    "gives zero for every token. Mean over prompts.",
    "control_loss": "The same at places of the captured text, with the next token as the answer.",
    "..._low, ..._high": "95% interval over prompts, from 30 prompts.",
    "..._shuffled": "The same with the answers of all prompts in place of the prompt's own, on "
    "average.",
    "..._p": "How often as much is reached with the answers shuffled between the prompts.",
    "..._p_corrected": "How often any expert reaches as much, each in units of its own spread.",
    "n_using": "Prompts of which any token uses the expert.",
    "part": "routed, all routed experts of the layer; shared, its shared experts; everything_else, "
    "embeddings, attention, dense networks and biases of all layers; logit, the sum.",
    "loss, rank": "Of the answer (its first token), by the model as it is.",
    "best": "The token that the model finds most probable.",
    "rank_correlation": "Spearman's, between the two measures over the experts of the prompt.",
}
_CLEAR = 0.05
_PARTS = {"routed": "routed experts", "shared": "shared experts", "everything_else": "all else"}
_NAMED = 4
_AXIS = alt.Axis(values=[-10, -3, -1, -0.3, -0.1, 0, 0.1, 0.3, 1, 3, 10], format=".2~r")
_STAR = " A star: more than for the answers of other prompts (p <= 0.05, corrected)."


@figures(
    "attribute",
    title="Localisation",
    question="Which experts carry this prediction?",
    columns=COLUMNS,
)
def draw(result: Result) -> list[Figure]:
    """Heat maps of both measures, the parts of the logit, agreement, and controls."""
    stacks = result.table["stack"]
    table = result.table.assign(heading=stacks if len(set(stacks)) > 1 else "")
    sample = f"{table['n_prompts'].iloc[0]} prompts" if table["n_prompts"].iloc[0] > 1 else ""
    drawn = [_ablation(table, sample)]
    if "parts" in result.tables:
        drawn = [
            _contribution(table, sample),
            *drawn,
            _parts(result.tables["parts"]),
            _agreement(table),
        ]
    return [*drawn, _controls(table)] if "control_loss" in table else drawn


def _contribution(table: pd.DataFrame, sample: str) -> Figure:
    return Figure(
        name="attribute-contribution",
        title="Which experts add to the logit of the answer themselves?",
        how_to_read="One cell is one expert of one layer: what it adds at the last token to the "
        "logit of the answer, above the mean over the vocabulary"
        + (f"; the mean over {sample}" if sample else "")
        + f". Blue: for the answer; orange: against it; {MISSING}."
        + _stars(table, "contribution"),
        limits="What an expert does through later layers, or at earlier tokens, is not in it. The "
        "scale of the final norm is held at what it is, though every expert has a part in it.",
        chart=_cells(table, "contribution", "added to the logit"),
        panels=_panels(table),
    )


def _ablation(table: pd.DataFrame, sample: str) -> Figure:
    return Figure(
        name="attribute-ablation",
        title="Without which experts is the answer less likely?",
        how_to_read="One cell is one expert of one layer: the rise of the loss of the answer, in "
        "nats, when it gives zero for every token"
        + (f"; the mean over {sample}" if sample else "")
        + f". Blue: the answer needs it; orange: the answer is more likely without it; {MISSING}."
        + _stars(table, "ablation_loss"),
        limits="Later layers meet a stream that they never saw and may mend or spoil; an expert "
        "whose work another does as well shows nothing. Without it everything else may be worse "
        "too.",
        chart=_cells(table, "ablation_loss", "rise of the loss (nats)"),
        panels=_panels(table),
    )


def _stars(table: pd.DataFrame, measure: str) -> str:
    return _STAR if table[f"{measure}_p_corrected"].notna().any() else ""


def _panels(table: pd.DataFrame) -> Panels:
    experts = table["expert"].nunique()
    return Panels(
        count=table["heading"].nunique(),
        minimum=max(220, 6 * experts),
        preferred=46 * experts + 60,
    )


def _cells(table: pd.DataFrame, measure: str, title: str) -> alt.LayerChart | alt.FacetChart:
    frame = table.assign(
        shown=table[measure].where(table["n_using"] > 0),
        clear=table[f"{measure}_p_corrected"] <= _CLEAR,
        why=(table["n_using"] > 0).map({True: "", False: "no token uses it"}),
    )
    reach = max(float(frame["shown"].abs().max()), 1e-6)
    x = alt.X("expert:O", title="expert")
    y = alt.Y("layer:O", title="layer", sort="ascending")
    tooltip = [
        label("layer", "layer"),
        label("expert", "expert"),
        tip(measure, title, "+.3f"),
        tip(f"{measure}_low", "95% interval, from", "+.3f"),
        tip(f"{measure}_high", "to", "+.3f"),
        tip(f"{measure}_shuffled", "with shuffled answers", "+.3f"),
        tip(f"{measure}_p", "p"),
        tip(f"{measure}_p_corrected", "p, corrected"),
        tip("n_using", "prompts that use it", ","),
        label("why", "missing"),
    ]
    colour = diverging("shown", title, reach, "format(datum.value, '+.2~r')")
    layers = [*matrix(x, y, "shown", colour, tooltip), *_star_marks(x, y)]
    frame["strong"] = frame["shown"].abs() > reach / 2
    height = alt.Step(24)
    if len(set(frame["heading"])) == 1:
        return alt.layer(*layers, data=frame).properties(height=height)
    panels: alt.FacetChart = (
        alt.layer(*layers, data=frame)
        .properties(height=height)
        .facet(facet=alt.Facet("heading:N", header=alt.Header(title=None)))
        .resolve_axis(x="independent")
    )
    return panels


def _star_marks(x: alt.X, y: alt.Y) -> list[alt.Chart]:
    """In two inks, for light and dark cells."""
    clear = alt.Chart().transform_filter("datum.clear && isValid(datum.shown)")
    weak, strong = (clear.transform_filter(test) for test in ("!datum.strong", "datum.strong"))
    return [
        chart.mark_text(text="*", style=style, tooltip=None, dy=3, fontSize=16).encode(x, y)
        for chart, style in ((weak, "number"), (strong, "number-strong"))
    ]


def _parts(parts: pd.DataFrame) -> Figure:
    whole = parts[parts["part"] == "logit"].iloc[0]
    frame = parts[parts["part"] != "logit"].assign(kind=parts["part"].map(_PARTS))
    frame["place"] = frame["layer"].map(lambda layer: "all" if pd.isna(layer) else str(layer))
    order = frame["place"].unique().tolist()
    kinds = [kind for kind in _PARTS.values() if kind in set(frame["kind"])]
    x = alt.X("place:N", title="layer", sort=order)
    offset = alt.XOffset("kind:N", sort=kinds)
    colour = alt.Color(
        "kind:N", title=None, scale=alt.Scale(domain=list(_PARTS.values()), range="category")
    )
    base = alt.Chart(frame.drop(columns="layer"))
    bars = base.mark_bar().encode(
        x,
        alt.Y("contribution:Q", title="added to the logit"),
        colour,
        offset,
        tooltip=[
            label("place", "layer"),
            label("kind", "part"),
            tip("contribution", "added", "+.3f"),
            tip("contribution_low", "95% interval, from", "+.3f"),
            tip("contribution_high", "to", "+.3f"),
        ],
    )
    spread = base.mark_rule(opacity=0.6, tooltip=None).encode(
        x, alt.Y("contribution_low:Q"), alt.Y2("contribution_high:Q"), xOffset=offset
    )
    return Figure(
        name="attribute-parts",
        title="Where does the logit of the answer come from?",
        how_to_read="A bar is what a part of the model adds directly to the logit of the answer, "
        f"and all bars add up to it: {whole['contribution']:+.2f} above the mean over the "
        f"vocabulary, mean over {whole['n_prompts']} prompts, with 95% intervals over them (none "
        "under 30). All else: embeddings, attention, dense networks and biases of all layers.",
        limits="A part may add little itself and yet feed what others add: this is only where the "
        "logit is written.",
        chart=alt.layer(bars, spread).properties(height=220),
        panels=Panels(minimum=max(260, 40 * len(order)), preferred=700),
    )


def _agreement(table: pd.DataFrame) -> Figure:
    return Figure(
        name="attribute-agreement",
        title="Do the two measures name the same experts?",
        how_to_read="A dot is an expert that some prompt uses: what it adds directly against the "
        "rise of the loss without it, means over prompts, on scales that widen around zero. Names "
        "are layer/expert.",
        limits="They ask different things: an expert may write the answer where others would do "
        "as well, or write nothing of it and prepare what others write.",
        chart=_dots(table, "contribution", "added to the logit"),
        panels=Panels(minimum=300, preferred=520),
    )


def _controls(table: pd.DataFrame) -> Figure:
    return Figure(
        name="attribute-controls",
        title="Do these experts carry these answers, or everything?",
        how_to_read="A dot is an expert: the rise of the loss without it at places of the captured "
        "text against that of the answers asked for, on scales that widen around zero. Dots high "
        "up and to the left matter to these answers and little to that text. Names are "
        "layer/expert.",
        limits="The captured text is one text: what else an expert does is not seen there.",
        chart=_dots(table, "control_loss", "rise of the loss on the captured text (nats)"),
        panels=Panels(minimum=300, preferred=520),
    )


def _dots(table: pd.DataFrame, across: str, title: str) -> alt.LayerChart | alt.FacetChart:
    """The loss under ablation against something else; names at those that stand out."""
    frame = table[table["n_using"] > 0]
    frame = frame.assign(named=frame["layer"].astype(str) + "/" + frame["expert"].astype(str))
    top = [frame[name].nlargest(_NAMED).index for name in (across, "ablation_loss")]
    frame["stands_out"] = frame.index.isin(top[0].union(top[1]))
    x = alt.X(f"{across}:Q", title=title, scale=_around_zero(frame[across]), axis=_AXIS)
    y = alt.Y(
        "ablation_loss:Q",
        title="rise of the loss of the answer (nats)",
        scale=_around_zero(frame["ablation_loss"]),
        axis=_AXIS,
    )
    base = alt.Chart(frame)
    dots = base.mark_point(filled=True, opacity=0.8, size=40).encode(
        x,
        y,
        tooltip=[
            label("stack", "stack"),
            label("layer", "layer"),
            label("expert", "expert"),
            tip(across, title, "+.3f"),
            tip("ablation_loss", "rise of the loss", "+.3f"),
            tip("n_using", "prompts that use it", ","),
        ],
    )
    names = (
        base.transform_filter("datum.stands_out")
        .mark_text(style="number", tooltip=None, dy=-10)
        .encode(x, y, alt.Text("named:N"))
    )
    return alt.layer(dots, names).properties(height=280)


def _around_zero(values: pd.Series) -> alt.Scale:
    constant = max(float(values.abs().max()) / 30, 1e-6)
    return alt.Scale(type="symlog", constant=constant, nice=False, padding=14)
