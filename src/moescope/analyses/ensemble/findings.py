"""What the table of `ensemble` says in words."""

import pandas as pd

from moescope.runs import Finding


def findings(table: pd.DataFrame) -> list[Finding]:
    """Ranges over layers of the medians over tokens."""
    layers = table[["stack", "layer"]].drop_duplicates()
    most = int(table["top_k"].max())
    top, random, lowest = (_range(table, "routed", name) for name in ("top", "random", "lowest"))
    published, bare = (_range(table, "published", name) for name in ("top", "residual_only"))
    stream, nothing = (_range(table, "residual", name) for name in ("top", "residual_only"))
    error = _range(table, "routed", "top", "relative_error")
    found = [
        Finding(
            text=f"Of the {most} routed experts of a token the one of the largest weight alone has "
            f"a median cosine of {top} with the sum of all, over {len(layers)} layers; a random "
            f"one of them has {random}, the one of the smallest weight {lowest}. What is missing "
            f"is {error} of the sum, by norm.",
            numbers={"cosine": _middle(table, "routed", "top")},
        ),
        Finding(
            text=f"As published, with the normed input of the block added on both sides, that "
            f"cosine is {published}; but the input without any expert has {bare} already.",
            numbers={
                "published_cosine": _middle(table, "published", "top"),
                "residual_only": _middle(table, "published", "residual_only"),
            },
        ),
        Finding(
            text=f"In the residual stream, where the output really goes, it is {stream}; the "
            f"stream without the block has {nothing}.",
            numbers={"residual_cosine": _middle(table, "residual", "top")},
        ),
    ]
    if (table["status"] == "few_documents").any():
        few = int(table["n_documents"].min())
        found.append(Finding(text=f"No intervals: too few documents ({few})."))
    return found


def _medians(table: pd.DataFrame, form: str, compared: str, measure: str) -> pd.Series:
    chosen = (table["form"] == form) & (table["compared"] == compared)
    return table[chosen & (table["measure"] == measure)]["median"]


def _range(table: pd.DataFrame, form: str, compared: str, measure: str = "cosine") -> str:
    """Lowest and highest layer."""
    medians = _medians(table, form, compared, measure)
    return f"{medians.min():.3f} to {medians.max():.3f}"


def _middle(table: pd.DataFrame, form: str, compared: str) -> float:
    """Of the median layer."""
    return float(_medians(table, form, compared, "cosine").median())
