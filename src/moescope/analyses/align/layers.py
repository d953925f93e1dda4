"""What an alignment found, by pair of layers."""

import math

import pandas as pd

CHANCE = 0.025
"""Chance of a 95% interval to lie above zero where there is nothing."""
FEWEST_SOURCES = 5
"""Imitated experts below which no correlation over them is given."""
LAYERS = ["source_layer", "target_layer"]


def by_layers(table: pd.DataFrame) -> pd.DataFrame:
    """A row per pair of layers: counts, medians over the pairs of experts that have a score."""
    rows = [_summary(frame) for _, frame in table.groupby(LAYERS, sort=True)]
    return pd.DataFrame(rows)


def _summary(table: pd.DataFrame) -> dict[str, float | int]:
    scored = table[table.score.notna()]
    tested = scored[scored.score_low.notna()]
    published = table.published_mse
    columns = ("fvu", "fvu_linear", "fvu_random", "fvu_self")
    return {
        "source_layer": int(table.source_layer.iloc[0]),
        "target_layer": int(table.target_layer.iloc[0]),
        "pairs": len(table),
        "scored": len(scored),
        "tested": len(tested),
        "above_zero": int((tested.score_low > 0).sum()),
        "by_chance": CHANCE * len(tested),
        "best_score": float(scored.score.max()),
        "median_score": float(scored.score.median()),
        **{name: float(scored[name].median()) for name in columns},
        "parameters_share": float(table.parameters_share.median()),
        "least_train": int(table.n_train.min()),
        "most_train": int(table.n_train.max()),
        "least_published": float(published.min()),
        "most_published": float(published.max()),
        "size_correlation": size_correlation(table),
    }


def size_correlation(table: pd.DataFrame) -> float:
    """Spearman correlation of the published error with the variance of the outputs.

    Over the imitated experts of one pair of layers, each with its median over the imitating ones;
    NaN under `FEWEST_SOURCES` of them.
    """
    known = table[table.published_mse.notna() & (table.fvu > 0)]
    by_source = known.assign(variance=known.mse_mean / known.fvu).groupby("source_expert")
    medians = by_source[["published_mse", "variance"]].median()
    if len(medians) < FEWEST_SOURCES:
        return math.nan
    return float(medians["published_mse"].corr(medians["variance"], method="spearman"))
