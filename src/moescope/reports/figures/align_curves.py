"""Errors of an alignment against training tokens, and against the size of the adapter."""

import altair as alt
import pandas as pd

from moescope.reports.figures.align_pairs import CURVES, LAYERS, names_of, naming
from moescope.reports.marks import facet_by_heading, label, tip
from moescope.reports.panels import Panels
from moescope.reports.registry import Figure

PAIR = ["source_layer", "source_expert", "target_layer", "target_expert"]

_MOST_PANELS = 12
_HIGHEST_FVU = 2.0


def learning(learning: pd.DataFrame) -> Figure:
    """Held-out FVU against training tokens, the best pair of each imitated expert."""
    best, which = _best_of_each_source(learning)
    best = best.assign(heading=names_of(best))
    long = best.melt(["heading", "n_train", "form"], list(CURVES), "curve", "value")
    long = long.replace({"curve": CURVES}).dropna(subset=["value"])
    names = list(CURVES.values())
    key = alt.Legend(title=None, columns=2)
    order = best["heading"].unique().tolist()
    chart = (
        alt.Chart(long)
        .mark_line(point=alt.OverlayMarkDef(size=34), clip=True)
        .encode(
            alt.X(
                "n_train:Q",
                title="training tokens (log scale)",
                scale=alt.Scale(type="log", nice=False, padding=8),
                axis=alt.Axis(format="~s", tickCount=4, grid=False),
            ),
            alt.Y("value:Q", title="held-out FVU", scale=_fvu_scale(long["value"])),
            alt.Color("curve:N", scale=alt.Scale(domain=names, range="category"), legend=key),
            tooltip=[
                label("heading", "pair"),
                label("curve", "curve"),
                tip("n_train", "training tokens", ","),
                label("form", "adapter"),
                tip("value", "FVU"),
            ],
        )
        .properties(height=150)
    )
    return Figure(
        name="align-learning",
        title="Would more tokens change the answer?",
        how_to_read="Each panel is an imitated expert with the expert that imitates it best on all "
        "tokens. Every point is a fit on a part of the training documents, the smaller parts "
        "inside the larger, all measured on the same held-out documents. A pair that is held back "
        f"by its tokens falls to the right faster than its controls.{naming(learning)}{which}",
        limits="The best pair is chosen from the numbers it is shown with; the order of the pairs "
        f"may be chance. A line that falls says nothing about where it ends.{_forms(best)}",
        chart=facet_by_heading(chart, order),
        panels=Panels(count=len(order), minimum=200, preferred=300),
    )


def _forms(rows: pd.DataFrame) -> str:
    """A warning where not all points are about the same adapter."""
    if (rows["form"] == rows["form"].iloc[0]).all():
        return ""
    return (
        " With fewer tokens than four times the hidden size the adapters are of low rank: part of "
        "the fall is due to that."
    )


def _best_of_each_source(learning: pd.DataFrame) -> tuple[pd.DataFrame, str]:
    """Rows of the pair with the lowest FVU on all tokens, of so many source experts."""
    last = learning.sort_values("n_train", kind="stable").groupby(PAIR, as_index=False).last()
    best = last.sort_values("fvu", kind="stable").groupby([*LAYERS, "source_expert"]).head(1)
    shown = best.sort_values(PAIR, kind="stable").head(_MOST_PANELS)
    left = len(best) - len(shown)
    which = f" {left} further imitated experts are in the table." if left else ""
    return shown[PAIR].merge(learning, on=PAIR), which


def capacity(capacity: pd.DataFrame) -> Figure:
    """Held-out FVU against the parameters of the adapter, real against random experts."""
    summaries = _summaries(capacity)
    shown = summaries.sort_values("advantage", ascending=False, kind="stable").head(_MOST_PANELS)
    rows = shown[[*PAIR, "heading"]].merge(capacity, on=PAIR)
    top = _fvu_scale(rows["fvu"])
    x = alt.X(
        "adapter_parameters:Q",
        title="parameters of the adapter (log scale)",
        scale=alt.Scale(type="log", nice=False, padding=8),
        axis=alt.Axis(format="~s", tickCount=4, grid=False),
    )
    names = ["imitating expert", "random experts, mean and sd"]
    colour = alt.Color(
        "target:N",
        scale=alt.Scale(domain=names, range="category"),
        legend=alt.Legend(title=None, columns=2),
    )
    base = alt.Chart(_real_and_random(rows, names))
    y = alt.Y("value:Q", title="held-out FVU", scale=top)
    chart = alt.layer(
        base.mark_area(opacity=0.25, clip=True, tooltip=None).encode(
            x, alt.Y("low:Q", scale=top), alt.Y2("high"), colour
        ),
        base.mark_line(point=alt.OverlayMarkDef(size=34), clip=True).encode(
            x,
            y,
            colour,
            tooltip=[
                label("target", "target"),
                tip("rank", "rank", ","),
                tip("adapter_parameters", "parameters", ","),
                tip("value", "FVU"),
                tip("sd", "sd"),
            ],
        ),
    ).properties(height=160)
    left = len(summaries) - len(shown)
    return Figure(
        name="align-capacity",
        title="How much adapter does the imitation need?",
        how_to_read="Each panel is one pair: held-out FVU against the size of the adapter, a "
        "diagonal at the left and a full matrix at the right, with the real expert and with random "
        "experts that keep its down projection. Advantage: the mean distance between the curves, "
        "above zero where the real expert leaves less. Smaller: how many times fewer parameters "
        "the real expert needs for what random experts reach with the full matrix."
        f"{naming(capacity)}{_of_all(summaries)}"
        + (f" Shown: the {len(shown)} largest advantages." if left else ""),
        limits="An advantage of one pair is within chance where the bands overlap, and the largest "
        "of many are chosen from the numbers they are shown with. All curves fall with size: only "
        "the distance tells.",
        chart=facet_by_heading(chart, shown["heading"].tolist()),
        panels=Panels(count=len(shown), minimum=200, preferred=300),
        table=summaries.drop(columns=["heading", *PAIR]),
    )


def _summaries(capacity: pd.DataFrame) -> pd.DataFrame:
    """A row per pair: both summaries, and what the largest adapter costs."""
    largest = capacity.groupby(PAIR, as_index=False)[["adapter_parameters", "parameters_share"]]
    pairs = largest.max().merge(
        capacity.groupby(PAIR, as_index=False)[["advantage", "parameters_saved"]].first(), on=PAIR
    )
    pairs.insert(0, "pair", names_of(pairs))
    saved = pairs["parameters_saved"].map(
        lambda x: "" if pd.isna(x) else f", {x:.1f} times smaller"
    )
    advantage = pairs["advantage"].map("advantage {:+.3f}".format)
    return pairs.assign(heading=pairs["pair"] + "\n" + advantage + saved)


def _of_all(summaries: pd.DataFrame) -> str:
    advantage, saved = summaries["advantage"], summaries["parameters_saved"].dropna()
    text = (
        f" Over {len(summaries)} pairs the advantage is {advantage.min():+.3f} to "
        f"{advantage.max():+.3f} (median {advantage.median():+.3f})"
    )
    if saved.empty:
        return f"{text}; none reaches what random experts reach with the full matrix."
    return f"{text}; {len(saved)} reach what random experts reach with the full matrix."


def _real_and_random(rows: pd.DataFrame, names: list[str]) -> pd.DataFrame:
    """One row per pair, target and rank: value, and where it is a mean its low, high and sd."""
    by = ["heading", "kind", "rank", "adapter_parameters"]
    frame = rows.groupby(by, as_index=False)["fvu"].agg(value="mean", sd="std")
    low, high = frame["value"] - frame["sd"], frame["value"] + frame["sd"]
    target = frame["kind"].map(dict(zip(("real", "random"), names, strict=True)))
    curves: pd.DataFrame = frame.assign(target=target, low=low, high=high).drop(columns="kind")
    return curves


def _fvu_scale(values: "pd.Series[float]") -> alt.Scale:
    return alt.Scale(domain=[0, min(_HIGHEST_FVU, max(1.05, 1.05 * values.max()))])
