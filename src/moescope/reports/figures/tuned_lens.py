"""Figures of the analysis `tuned-lens`: how near each lens comes, and how the training went."""

import altair as alt
import pandas as pd

from moescope.reports.marks import label, tip
from moescope.reports.panels import Panels
from moescope.reports.registry import Figure, figures
from moescope.runs import Result

COLUMNS = {
    "lens": "How the state after a layer is decoded, always with the model's own final norm and "
    "unembedding: logit, as it is; debiased, after adding the mean of what later layers add; "
    "tuned, after the trained affine map. constant is no lens, but the mean of the model's own "
    "predictions, everywhere; model is the model itself.",
    "against": "What the tuned lens is held against: its value minus that one's.",
    "layer": "The model's own number.",
    "domain": "Kind of text; all = every domain together.",
    "kl": "KL divergence from the model's own prediction to that of the lens, nats; in the table "
    "of the training, over the documents of the choice.",
    "agreement": "Share of predictions whose likeliest token is that of the model.",
    "loss": "Negative log-likelihood of the next token, nats.",
    "step, tokens": "Optimiser steps, and training tokens of all of them.",
    "kept": "Whether the translator of the layer is what it was at this check: the lowest KL.",
}

_LENSES = {"logit": "logit lens", "debiased": "mean shift", "tuned": "tuned lens"}
_MEASURES = {
    "kl": ("KL from the model's prediction (nats)", "~g"),
    "agreement": ("same likeliest token as the model", "%"),
    "loss": ("loss of the next token (nats)", "~g"),
}
_REFERENCES = {"kl": "constant", "agreement": "constant", "loss": "model"}


@figures(
    "tuned-lens",
    title="Tuned lens",
    question="What would the states after each layer predict, put in the terms of the last one?",
    columns=COLUMNS,
)
def draw(result: Result) -> list[Figure]:
    """Measures by layer, the gain by domain, and the course of the training."""
    overall = result.table[result.table["domain"] == "all"]
    gains = result.tables["gains"]
    return [_lenses(overall), _gains(gains), _training(result.tables["training"])]


def _lenses(overall: pd.DataFrame) -> Figure:
    shown = overall[overall["layer"].notna()].astype({"layer": int})
    shown = shown.assign(lens=shown["lens"].map(_LENSES))
    others = overall.set_index("lens")
    panels = [
        _panel(shown, measure, float(others[measure][other]))
        for measure, other in _REFERENCES.items()
        if measure in others
    ]
    return Figure(
        name="tuned-lens-layers",
        title="How near to the model's own prediction is the state after each layer?",
        how_to_read="A dot is a lens on the state after a layer, over all predictions of the "
        "held-out documents, with its 95% interval over documents (none under 30). Dashed: in the "
        "first two panels one prediction that is the same everywhere, in the third the model.",
        limits="That an affine map of a state predicts well does not mean that the model uses the "
        "state so: the map is trained to find whatever an affine map can find. The last layer "
        "of the model, where it has experts, is decoded exactly by every lens.",
        chart=alt.concat(*panels),
        panels=Panels(count=len(panels), minimum=max(200, 16 * shown["layer"].nunique())),
    )


def _panel(shown: pd.DataFrame, measure: str, reference: float) -> alt.LayerChart | alt.FacetChart:
    title, number = _MEASURES[measure]
    x = alt.X("layer:O", title="layer", axis=alt.Axis(labelAngle=0))
    scale = alt.Scale(zero=measure != "loss")
    y = alt.Y(f"{measure}:Q", title=title, axis=alt.Axis(format=number), scale=scale)
    colour = _colour("lens", "", list(_LENSES.values()))
    base = alt.Chart(shown)
    rule = alt.Chart(pd.DataFrame({measure: [reference]})).mark_rule(strokeDash=[4, 3])
    return alt.layer(
        rule.encode(alt.Y(f"{measure}:Q"), tooltip=[tip(measure, "dashed")]),
        base.mark_line(strokeWidth=1.2, opacity=0.7, tooltip=None).encode(x, y, colour),
        base.mark_rule(opacity=0.6, tooltip=None).encode(
            x, alt.Y(f"{measure}_low:Q"), alt.Y2(f"{measure}_high:Q"), colour
        ),
        base.mark_point(filled=True, opacity=1, size=38).encode(
            x,
            y,
            colour,
            tooltip=[
                label("lens", "lens"),
                tip("layer", "layer", "d"),
                tip(measure, title),
                tip(f"{measure}_low", "95% interval, from"),
                tip(f"{measure}_high", "to"),
                tip("n_tokens", "predictions", ","),
                tip("n_documents", "documents", ","),
            ],
        ),
    ).properties(height=220)


def _gains(gains: pd.DataFrame) -> Figure:
    shown = gains[(gains["against"] != "constant") & (gains["domain"] == "all")]
    shown = shown.assign(against=shown["against"].map(_LENSES))
    x = alt.X("layer:O", title="layer", axis=alt.Axis(labelAngle=0))
    y = alt.Y("kl:Q", title="KL of the tuned lens minus that of the other (nats)")
    order = [_LENSES["logit"], _LENSES["debiased"]]
    colour = _colour("against", "against", order)
    offset = alt.XOffset("against:N", sort=order)
    base = alt.Chart(shown)
    chart = alt.layer(
        base.mark_rule(opacity=0.6, tooltip=None).encode(
            x, alt.Y("kl_low:Q"), alt.Y2("kl_high:Q"), colour, offset
        ),
        base.mark_point(filled=True, opacity=1, size=38).encode(
            x,
            y,
            colour,
            offset,
            tooltip=[
                label("against", "against"),
                tip("layer", "layer", "d"),
                tip("kl", "difference"),
                tip("kl_low", "95% interval, from"),
                tip("kl_high", "to"),
                tip("agreement", "difference of agreement", ".1%"),
                tip("n_tokens", "predictions", ","),
                tip("n_documents", "documents", ","),
            ],
        ),
    ).properties(height=220)
    return Figure(
        name="tuned-lens-gain",
        title="Where does the trained map help?",
        how_to_read="A dot below 0 says that the tuned lens is nearer to the model's own "
        "prediction than the other lens, on the same tokens of held-out documents, with the 95% "
        "interval of the difference over documents. At 0 nothing was gained: the state is "
        "decoded exactly already, or no map was better on the documents of the choice.",
        limits="Intervals are those of the documents: other training documents, or other steps, "
        "would give other maps, and that is not in them. Layers are not corrected for their "
        "number.",
        chart=chart,
        panels=Panels(minimum=max(260, 26 * shown["layer"].nunique()), preferred=560),
    )


def _training(course: pd.DataFrame) -> Figure:
    first, last = course["layer"].min(), course["layer"].max()
    paler = first - 0.4 * max(1, last - first)  # so that the first layer is seen
    chart = (
        alt.Chart(course)
        .mark_line(point=alt.OverlayMarkDef(size=30))
        .encode(
            alt.X("step:Q", title="optimiser step"),
            alt.Y("kl:Q", title="KL, documents of the choice (nats)"),
            alt.Color(
                "layer:Q",
                title="layer",
                scale=alt.Scale(domain=[paler, last], range="ramp", interpolate="rgb"),
                legend=alt.Legend(format="d", values=[first, (first + last) // 2, last]),
            ),
            detail="layer:N",
            tooltip=[
                tip("layer", "layer", "d"),
                tip("step", "step", "d"),
                tip("tokens", "training tokens", ","),
                tip("kl", "KL"),
                label("kept", "kept"),
            ],
        )
        .properties(height=220)
    )
    return Figure(
        name="tuned-lens-training",
        title="Did the training settle?",
        how_to_read="A line is a layer; a dot is its KL at a check, on documents that gave no "
        "gradient and are not in the other figures. Step 0 is the logit lens. Lines that still "
        "fall at the end would gain from more steps.",
        limits="The rate falls to zero with the steps, so every line flattens towards the end, "
        "settled or not; a second training with more steps tells.",
        chart=chart,
        panels=Panels(preferred=560),
    )


def _colour(field: str, title: str, order: list[str]) -> alt.Color:
    return alt.Color(
        f"{field}:N",
        title=title,
        scale=alt.Scale(domain=order, range="category"),
        legend=alt.Legend(columns=3),
    )
