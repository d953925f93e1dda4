"""Losses of changed models in tables and words: their rise, and differences between them."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy.special import ndtr, ndtri

from moescope.evaluate.totals import Resampling, counts, difference_columns, mean_columns
from moescope.measures.multiple_tests import holm

_NORMAL = float(ndtri(0.975))


def loss_columns(documents: pd.DataFrame, resampling: Resampling) -> dict[str, object]:
    """Loss per token and its difference from the model as it is, with intervals and counts."""
    return {
        **mean_columns(documents, ["loss"], resampling),
        **difference_columns(documents, "difference", resampling),
        **counts(documents, resampling),
    }


def paired_columns(
    own: pd.DataFrame, others: Sequence[pd.DataFrame], resampling: Resampling
) -> dict[str, object]:
    """By how much the loss lies above the mean of others, with the interval of the difference."""
    mean = sum(other["loss"] for other in others) / len(others)
    frame = own.assign(difference=own["loss"] - mean)
    return difference_columns(frame, "difference", resampling) | counts(frame, resampling)


def judged(table: pd.DataFrame) -> pd.DataFrame:
    """With p-values of no difference, those corrected for the number of rows, and the verdict.

    The p-value is that of a normal distribution with the row's 95% limits. verdict: `lower` or
    `higher` where the corrected one is under 0.05, `open` elsewhere, nothing without limits.
    """
    low, high = table["difference_low"].to_numpy(), table["difference_high"].to_numpy()
    middle, reach = (low + high) / 2, (high - low) / 2
    with np.errstate(divide="ignore", invalid="ignore"):
        distance = np.where(middle == 0, 0, np.abs(middle) / reach)
    p_value = np.where(np.isnan(middle), np.nan, 2 * ndtr(-_NORMAL * distance))
    corrected = holm(p_value)
    verdict = np.where(corrected < 0.05, np.where(middle < 0, "lower", "higher"), "open")
    verdict[np.isnan(middle)] = ""
    return table.assign(p_value=p_value, p_corrected=corrected, verdict=verdict)


def rise_of(row: pd.Series) -> str:
    """The difference of a row in words, with its interval if it has one."""
    text = nats(row["difference"])
    if pd.notna(row["difference_low"]):
        low, high = nats(row["difference_low"]), nats(row["difference_high"])
        text += f" (95% interval {low} to {high})"
    return text


def nats(value: float) -> str:
    """With its sign, but without one where it rounds to zero."""
    return f"{round(value, 3) + 0.0:+.3f}"
