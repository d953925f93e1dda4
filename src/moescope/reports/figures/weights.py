"""Figures of the analysis `weights`: how alike experts are, by depth, by pair, once matched."""

import altair as alt
import pandas as pd

from moescope.reports.figures.weights_matrices import by_layer, experts, with_places
from moescope.reports.marks import label, tip
from moescope.reports.panels import Panels
from moescope.reports.registry import Figure, figures
from moescope.runs import Result

COLUMNS = {
    "matrix": "gate, up, down; all: each of them scaled to the same norm, together.",
    "measure": "cosine: of whole matrices, neuron i beside neuron i; average: of the means over "
    "neurons.",
    "mean, low, high": "Over pairs of experts, with the 95% interval by leaving out one expert at "
    "a time: how it would vary over experts as these.",
    "least, most": "Of all pairs.",
    "best": "Mean over experts of the largest cosine with any expert of the other layer.",
    "cosine_, average_, centred_": "By matrix: cosine of matrices; of means over neurons; of these "
    "without what is common to all experts of the layer.",
    "router, centred_router": "Cosine of the router's rows for both experts; without their mean.",
    "r, r_squared": "Pearson's correlation over pairs of experts, and its square.",
    "p_value": "Mantel test: share of permutations of experts with a correlation as far from 0.",
    "p_corrected": "The same after Holm's correction over all rows.",
    "in_order, matched": "Cosine of two experts, neurons in their order; after the best joint "
    "permutation of neurons.",
    "tau": "Kendall's tau of that permutation.",
    "procrustes": "Cosine after the best rotation of neurons.",
    "cka": "Linear CKA, neurons as features.",
    "gaussian_": "The same for pairs of Gaussian experts of equal shape: mean, least, most.",
    "scrambled_": "The same with the directions of one expert of each pair permuted, with random "
    "signs.",
    "apart": "0 within a layer, 1 between neighbouring layers.",
    "first, second": "Coordinates of an expert on the first two principal components of its layer.",
    "first_share, second_share, third_share": "Of the variance, on the first components.",
    "dimensions": "Over how many directions neurons spread (participation ratio); "
    "gaussian_dimensions: as many independent ones.",
}

CONVERTED = (0.2, 0.4)
"""Published range of the mean cosine of matrices in models converted from a dense one."""
_MATRICES = ("gate", "up", "down", "all")
_SERIES = {"cosine": "as matrices", "average": "means of neurons"}
_MEASURES = {"in_order": "in order", "matched": "matched"}
_NULLS = {"gaussian": "Gaussian, matched", "scrambled": "scrambled, matched"}
_MOST_POINTS = 3_000
Layered = alt.LayerChart | alt.FacetChart


@figures(
    "weights",
    title="Experts as matrices",
    question="How alike are experts as matrices, and do router rows follow their neurons?",
    columns=COLUMNS,
)
def draw(result: Result) -> list[Figure]:
    """Likeness by depth, by pair and across layers; matching; router rows; the ancestor."""
    drawn = []
    if result.table["mean"].notna().any():
        drawn = [_depth(with_places(result.table)), experts(result.tables["pairs"])]
    if len(result.tables["layers"]) > 1:
        drawn.append(by_layer(result.tables["layers"], result.tables["pairs"]))
    matching = result.tables["matching"]
    if not matching.empty and (matching["apart"] == 0).any():
        drawn.append(_matching(with_places(matching[matching["apart"] == 0])))
    if result.tables["router"]["r"].notna().any():
        drawn.append(_router(with_places(result.tables["router"]), result.tables["pairs"]))
    if "ancestor" in result.tables and (result.tables["ancestor"]["status"] == "ok").any():
        drawn.append(_ancestor(with_places(result.tables["ancestor"])))
    return drawn


def _depth(table: pd.DataFrame) -> Figure:
    table = table.assign(series=table["measure"].map(_SERIES))
    present = [name for name in _MATRICES if name in set(table["matrix"])]
    panels = [_depth_panel(table[table["matrix"] == name], name) for name in present]
    return Figure(
        name="weights-depth",
        title="How alike are the experts of a layer?",
        how_to_read="A dot is the mean cosine over all pairs of experts of a layer, with its 95% "
        "interval over experts (none under 5): of whole matrices, and of the means of their "
        "neurons, which need no order. Grey band: 0.2 to 0.4, the published range of matrices of "
        "models converted from a dense one; dashed: 0, about what models trained from scratch "
        "have (A Closer Look into MoE; other models than this).",
        limits="A cosine near 0 does not say that experts do different things: the order of "
        "neurons means nothing to an expert, and the cosine of matrices does not survive another "
        "order. Means of neurons share the direction that all neurons of a layer share.",
        chart=alt.concat(*panels).resolve_scale(y="shared"),
        panels=Panels(
            count=len(panels),
            minimum=max(220, 16 * table["place"].nunique()),
            preferred=400,
            across=2,
        ),
    )


def _depth_panel(rows: pd.DataFrame, matrix: str) -> Layered:
    order = rows["place"].unique().tolist()
    x = alt.X("place:N", sort=order, title="layer")
    reference = alt.Chart(pd.DataFrame({"low": [CONVERTED[0]], "high": [CONVERTED[1]]}))
    zero = alt.Chart(pd.DataFrame({"value": [0.0]}))
    base = alt.Chart(rows)
    colour = alt.Color(
        "series:N",
        title=None,
        scale=alt.Scale(domain=list(_SERIES.values()), range="category"),
    )
    y = alt.Y("mean:Q", title="mean cosine of pairs")
    tooltip = [
        label("place", "layer"),
        label("series", "compared"),
        tip("mean", "mean cosine"),
        tip("low", "from"),
        tip("high", "to"),
        tip("most", "most alike pair"),
        tip("n_pairs", "pairs", ","),
    ]
    return alt.layer(
        reference.mark_rect(style="null-band", tooltip=None).encode(alt.Y("low:Q"), alt.Y2("high")),
        zero.mark_rule(style="reference", tooltip=None).encode(alt.Y("value:Q")),
        base.mark_rule(tooltip=None).encode(x, alt.Y("low:Q"), alt.Y2("high"), colour),
        base.mark_point(filled=True, size=45).encode(x, y, colour, tooltip=tooltip),
    ).properties(height=190, title=matrix)


def _matching(rows: pd.DataFrame) -> Figure:
    order = rows["place"].unique().tolist()
    return Figure(
        name="weights-matching",
        title="Do experts share neurons, in another order?",
        how_to_read="Left: cosine of pairs of experts of a layer, neurons in their order and after "
        "the one permutation of gate, up and down together that makes it largest, with 95% "
        "intervals over experts; and what the same search finds in pairs of Gaussian experts of "
        "equal shape, and in these experts with the directions of one of each pair scrambled (mean "
        "and whole range). Right: Kendall's tau of the permutation found: 1 if no neuron moved, "
        "about 0 if it is as good as random.",
        limits="Above both nulls means that neurons of different experts lie in directions that "
        "they share, not that they do the same: gains, signs and what comes in differ.",
        chart=alt.concat(
            _matched_panel(rows, order, dict(_MEASURES) | _NULLS, "cosine"),
            _matched_panel(rows, order, {"tau": "of the permutation found"}, "Kendall's tau"),
        ).resolve_scale(color="independent", xOffset="independent"),
        panels=Panels(count=2, minimum=max(260, 18 * len(order)), preferred=400),
    )


def _matched_panel(
    rows: pd.DataFrame, order: list[str], names: dict[str, str], title: str
) -> Layered:
    frames = []
    for key, name in names.items():
        if key in _NULLS:
            frame = rows[rows["measure"] == "matched"]
            columns = {f"{key}_{end}": end for end in ("mean", "low", "high", "pairs")}
            frame = frame[["place", *columns]].rename(columns=columns)
        else:
            frame = rows[rows["measure"] == key][["place", "mean", "low", "high", "n_pairs"]]
            frame = frame.rename(columns={"n_pairs": "pairs"})
        frames.append(frame.assign(series=name))
    x = alt.X("place:N", sort=order, title="layer")
    offset = alt.XOffset("series:N", sort=list(names.values()))
    colour = alt.Color(
        "series:N",
        title=None,
        sort=None,
        scale=alt.Scale(domain=list(names.values()), range="category"),
        legend=alt.Legend(columns=2) if len(names) > 1 else None,
    )
    base = alt.Chart(pd.concat(frames, ignore_index=True))
    tooltip = [
        label("place", "layer"),
        label("series", "pairs"),
        tip("mean", "mean"),
        tip("low", "from"),
        tip("high", "to"),
        tip("pairs", "pairs", ","),
    ]
    zero = alt.Chart(pd.DataFrame({"value": [0.0]}))
    return alt.layer(
        zero.mark_rule(style="reference", tooltip=None).encode(alt.Y("value:Q")),
        base.mark_rule(tooltip=None).encode(x, alt.Y("low:Q"), alt.Y2("high"), colour, offset),
        base.mark_point(filled=True, size=45).encode(
            x, alt.Y("mean:Q", title=title), colour, offset, tooltip=tooltip
        ),
    ).properties(height=220)


def _router(rows: pd.DataFrame, pairs: pd.DataFrame) -> Figure:
    order = rows["place"].unique().tolist()
    own = with_places(pairs[pairs["router"].notna()])
    own = own.assign(depth=own["place"].map({place: i for i, place in enumerate(order)}))
    shown = own if len(own) <= _MOST_POINTS else own.sample(_MOST_POINTS, random_state=0)
    return Figure(
        name="weights-router",
        title="Do experts with similar router rows have similar neurons?",
        how_to_read="Left: correlation, over the pairs of experts of a layer, of the cosine of "
        "their router rows with the cosine of the means of their neurons; filled where the "
        "permutation test is clear after correction. Right: the pairs behind the numbers for gate"
        + (f", {_MOST_POINTS:,} of them at random." if len(shown) < len(own) else ".")
        + " Published R2 for gate, other models than this: Mixtral 0.33, Mixtral-8x22B 0.26, "
        "DeepSeekMoE 0.40, Grok 0.15; for up and down 0.00 to 0.13.",
        limits="With 8 experts there are 28 pairs that share experts: R2 is 0.04 on average "
        "without any relation, and above 0.14 in one layer of 20. A correlation does not say that "
        "the router reads the neurons.",
        chart=alt.concat(_correlations(rows, order), _points(shown, len(order) - 1)).resolve_scale(
            color="independent"
        ),
        panels=Panels(count=2, minimum=max(240, 14 * len(order)), preferred=400),
    )


def _correlations(rows: pd.DataFrame, order: list[str]) -> Layered:
    rows = rows[rows["form"] == "average"]
    rows = rows.assign(clear=rows["p_corrected"] <= 0.05)
    colour = alt.Color(
        "matrix:N",
        title=None,
        scale=alt.Scale(domain=list(_MATRICES[:3]), range="category"),
    )
    x, y = alt.X("place:N", sort=order, title="layer"), alt.Y("r:Q", title="r over pairs")
    tooltip = [
        label("place", "layer"),
        label("matrix", "matrix"),
        tip("r", "r"),
        tip("r_squared", "R2"),
        tip("p_value", "p"),
        tip("p_corrected", "p, corrected"),
        tip("n_pairs", "pairs", ","),
    ]
    base = alt.Chart(rows)
    zero = alt.Chart(pd.DataFrame({"value": [0.0]}))
    return alt.layer(
        zero.mark_rule(style="reference", tooltip=None).encode(alt.Y("value:Q")),
        base.transform_filter("!datum.clear")
        .mark_point(filled=False, size=55)
        .encode(x, y, colour, tooltip=tooltip),
        base.transform_filter("datum.clear")
        .mark_point(filled=True, size=70)
        .encode(x, y, colour, tooltip=tooltip),
    ).properties(height=220)


def _points(pairs: pd.DataFrame, last: int) -> alt.Chart:
    matrix = "gate" if "average_gate" in pairs else "up"
    scale = alt.Scale(domain=[-max(1, last) / 2, max(1, last)], range="ramp", interpolate="rgb")
    chart: alt.Chart = (
        alt.Chart(pairs)
        .mark_point(filled=True, size=26, opacity=0.8)
        .encode(
            alt.X("router:Q", title="cosine of router rows"),
            alt.Y(f"average_{matrix}:Q", title=f"cosine of mean {matrix} neurons"),
            alt.Color("depth:Q", title="sparse layer, from 0", scale=scale).legend(
                values=[0, last], format="d"
            ),
            tooltip=[
                label("place", "layer"),
                label("expert", "expert"),
                label("other_expert", "and expert"),
                tip("router", "router rows"),
                tip(f"average_{matrix}", f"mean {matrix} neurons"),
                tip("cosine_all", "as matrices"),
            ],
        )
        .properties(height=220)
    )
    return chart


def _ancestor(rows: pd.DataFrame) -> Figure:
    order = rows["place"].unique().tolist()
    x = alt.X("place:N", sort=order, title="layer")
    base = alt.Chart(rows[rows["status"] == "ok"])
    tooltip = [
        label("place", "layer"),
        label("expert", "expert"),
        tip("matched", "matched"),
        tip("cosine_all", "in order"),
        tip("gaussian_matched", "Gaussian, matched"),
    ]
    return Figure(
        name="weights-ancestor",
        title="How much of the dense ancestor is left in each expert?",
        how_to_read="A dot is an expert: the cosine with the feed-forward layer of the same number "
        "in the ancestor, neurons matched; of an expert with fewer neurons, with those that fit it "
        "best. 1 is a copy. Dashes: what Gaussian experts of these shapes reach by matching.",
        limits="A copy that was scaled or turned by training is not recognised; that a cosine is "
        "above chance does not say that the expert was made from the ancestor.",
        chart=alt.layer(
            base.mark_point(filled=True, size=40).encode(
                x, alt.Y("matched:Q", title="cosine, matched"), tooltip=tooltip
            ),
            base.mark_tick(style="reference", size=18, tooltip=None).encode(
                x, alt.Y("gaussian_matched:Q")
            ),
        ).properties(height=220),
        panels=Panels(count=1, preferred=760),
    )
