"""Pairs of experts as the alignment figures need them: labelled, grouped, never a false number."""

import pandas as pd

from moescope.reports.marks import Tooltips, label, tip
from moescope.reports.panels import Panels

NO_SCORE = ("too_few_tokens", "constant_outputs", "no_controls", "no_ceiling", "undefined")
"""Statuses under which a score must not be shown, whatever the table holds."""

LayerPair = tuple[int, int]

_MOST_LAYER_PAIRS = 6


def measured(table: pd.DataFrame) -> pd.DataFrame:
    """The pairs with labels and output variance, and without scores where there can be none."""
    pairs = table.reset_index(drop=True).copy()
    scores = ["score", "score_low", "score_high"]
    pairs.loc[pairs["status"].isin(NO_SCORE), scores] = float("nan")
    several = len(layer_pairs(pairs)) > 1
    source, target = pairs["source_expert"].astype(str), pairs["target_expert"].astype(str)
    if several:
        source = pairs["source_layer"].astype(str) + "." + source
        target = pairs["target_layer"].astype(str) + "." + target
    pairs["pair"] = source + " \u2192 " + target
    pairs["output_variance"] = pairs["mse_mean"] / pairs["fvu"]
    return pairs


def layer_pairs(pairs: pd.DataFrame) -> list[tuple[LayerPair, pd.DataFrame]]:
    """The pairs by source and target layer; the first few where there are many."""
    groups = pairs.groupby(["source_layer", "target_layer"], sort=True)
    found = [
        ((int(frame["source_layer"].iloc[0]), int(frame["target_layer"].iloc[0])), frame)
        for _, frame in groups
    ]
    return found[:_MOST_LAYER_PAIRS]


def title_of(pair: LayerPair) -> str:
    """Layer pair in words."""
    return f"layer {pair[0]} \u2192 layer {pair[1]}"


def pair_panels(pairs: pd.DataFrame, count: int) -> Panels:
    """Panels for matrices of pairs: as wide as their cells want to be."""
    wide = int(pairs["target_expert"].nunique())
    return Panels(count=count, minimum=max(190, 14 * wide), preferred=max(280, 58 * wide))


_NUMBERS = {
    "score": ("score", ".3~f"),
    "score_low": ("95% interval, from", ".3~f"),
    "score_high": ("to", ".3~f"),
    "fvu": ("FVU of the pair", ".3~f"),
    "fvu_linear": ("FVU of a linear map", ".3~f"),
    "fvu_random": ("FVU of random experts", ".3~f"),
    "fvu_self": ("FVU of the ceiling", ".3~f"),
    "published_mse": ("published error", ".3~g"),
    "n_val": ("held-out tokens", ","),
    "n_documents": ("documents", ","),
}
PAIR_FIELDS = ("pair", "status", *_NUMBERS)
"""Columns that `pair_tooltip` reads."""


def pair_tooltip() -> Tooltips:
    """What there is to know of one pair."""
    numbers = (tip(name, title, number) for name, (title, number) in _NUMBERS.items())
    return [label("pair", "pair"), label("status", "status"), *numbers]


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
