"""Pairs of experts as the alignment figures need them: labelled, grouped, never a false number."""

import pandas as pd

from moescope.reports.marks import Tooltips, label, tip
from moescope.reports.panels import Panels

NO_SCORE = ("too_few_tokens", "constant_outputs", "no_controls", "no_ceiling", "undefined")
"""Statuses under which a score must not be shown, whatever the table holds."""

LayerPair = tuple[int, int]
LAYERS = ["source_layer", "target_layer"]
CURVES = {
    "fvu": "pair",
    "fvu_linear": "linear map",
    "fvu_random": "random experts",
    "fvu_self": "ceiling",
}
"""Errors that are drawn as curves, and what they are called there."""

_MOST_LAYER_PAIRS = 6
MOST_CELLS = 1_600
"""Cells of heat maps that a page has room for with all their numbers."""


def measured(table: pd.DataFrame) -> pd.DataFrame:
    """The pairs with labels and output variance, and without scores where there can be none."""
    pairs = table.reset_index(drop=True).copy()
    scores = ["score", "score_low", "score_high"]
    pairs.loc[pairs["status"].isin(NO_SCORE), scores] = float("nan")
    pairs["pair"] = names_of(pairs)
    pairs["layers"] = _arrow(pairs["source_layer"].astype(str), pairs["target_layer"].astype(str))
    pairs["output_variance"] = pairs["mse_mean"] / pairs["fvu"]
    return pairs


def names_of(pairs: pd.DataFrame) -> "pd.Series[str]":
    """Each pair by its experts; where there are several pairs of layers, by layer.expert."""
    source, target = pairs["source_expert"].astype(str), pairs["target_expert"].astype(str)
    if several_layers(pairs):
        source = pairs["source_layer"].astype(str) + "." + source
        target = pairs["target_layer"].astype(str) + "." + target
    return _arrow(source, target)


def naming(pairs: pd.DataFrame) -> str:
    """A sentence on how the pairs are named, where that needs one."""
    return " Experts are named layer.expert." if several_layers(pairs) else ""


def several_layers(pairs: pd.DataFrame) -> bool:
    """Whether the pairs are of more than one pair of layers."""
    return len(pairs[LAYERS].drop_duplicates()) > 1


def _arrow(source: "pd.Series[str]", target: "pd.Series[str]") -> "pd.Series[str]":
    return source + " \u2192 " + target


def layer_pairs(pairs: pd.DataFrame) -> list[tuple[LayerPair, pd.DataFrame]]:
    """The pairs by source and target layer."""
    return [
        ((int(frame["source_layer"].iloc[0]), int(frame["target_layer"].iloc[0])), frame)
        for _, frame in pairs.groupby(LAYERS, sort=True)
    ]


def shown_layer_pairs(pairs: pd.DataFrame) -> tuple[list[tuple[LayerPair, pd.DataFrame]], str]:
    """As many pairs of layers, in order, as a chart has room for, and words for the others."""
    groups = layer_pairs(pairs)
    shown = groups[:1]
    for group in groups[1:_MOST_LAYER_PAIRS]:
        if sum(len(frame) for _, frame in [*shown, group]) > MOST_CELLS:
            break
        shown.append(group)
    if len(shown) == len(groups):
        return shown, ""
    return shown, f" Shown: the first {len(shown)} of {len(groups)} pairs of layers."


def title_of(pair: LayerPair) -> str:
    """Layer pair in words."""
    return f"layer {pair[0]} \u2192 layer {pair[1]}"


def pair_panels(pairs: pd.DataFrame, count: int, cell: int, across: int | None = None) -> Panels:
    """Panels for matrices of pairs: as wide as their cells want to be, at least `cell` pixels."""
    wide = int(pairs["target_expert"].nunique())
    least = max(190, cell * wide)
    preferred = max(280, 58 * wide)
    return Panels(count=count, minimum=least, preferred=preferred, across=across)


NAMES = {
    "source_expert": "imitated expert",
    "target_expert": "imitating expert",
    "status": "status",
}
_NUMBERS = {
    "score": ("score", ".3~f"),
    "score_low": ("95% interval, from", ".3~f"),
    "score_high": ("to", ".3~f"),
    "fvu": ("FVU of the pair", ".3~f"),
    "fvu_linear": ("FVU of a linear map", ".3~f"),
    "fvu_random": ("FVU of random experts", ".3~f"),
    "fvu_self": ("FVU of the ceiling", ".3~f"),
    "published_mse": ("published error", ".3~g"),
    "output_variance": ("variance of f(x)", ".3~g"),
    "n_val": ("held-out tokens", ","),
    "n_documents": ("documents", ","),
}
SCORE_FIELDS = tuple(n for n in _NUMBERS if n != "output_variance")
"""What the tooltip of a score tells."""
ERROR_FIELDS = ("published_mse", "output_variance", "fvu", "score")
"""What the tooltip of a raw error tells."""


def pair_tooltip(fields: tuple[str, ...]) -> Tooltips:
    """What there is to know of one pair: its experts, its status and these numbers."""
    numbers = (tip(name, *_NUMBERS[name]) for name in fields)
    return [*(label(name, title) for name, title in NAMES.items()), *numbers]


def gaps(pairs: pd.DataFrame) -> str:
    """Sentences that count the pairs without a score, and with a weak one, by their status."""
    absent = pairs["score"].isna()
    weak = ~absent & (pairs["status"] != "ok")
    return _counted(pairs, absent, "have no score") + _counted(pairs, weak, "have a weak score")


def _counted(pairs: pd.DataFrame, which: pd.Series, what: str) -> str:
    if not which.any():
        return ""
    counts = pairs.loc[which, "status"].value_counts()
    reasons = ", ".join(f"{count} {str(name).replace('_', ' ')}" for name, count in counts.items())
    return f" {which.sum()} of {len(pairs)} pairs {what}: {reasons}."
