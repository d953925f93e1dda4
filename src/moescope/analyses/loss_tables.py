"""Losses of changed models in tables and words: their rise, and differences between them."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from moescope.analyses.losses import Setting
from moescope.evaluate.draws import loss_difference
from moescope.evaluate.totals import Resampling, counts, difference_columns, mean_columns
from moescope.measures.multiple_tests import holm


def loss_columns(documents: pd.DataFrame, resampling: Resampling) -> dict[str, object]:
    """Loss per token and its difference from the model as it is, with intervals and counts."""
    return {
        **mean_columns(documents, ["loss"], resampling),
        **difference_columns(documents, "difference", resampling),
        **counts(documents, resampling),
    }


def against_table(
    sums: Mapping[Setting, pd.DataFrame],
    compared: Sequence[Setting],
    size: str,
    resampling: Resampling,
) -> pd.DataFrame:
    """By how much the loss of some settings lies above that of each other one of the same size.

    Paired by document, on all domains. Random choices are one row, the mean of their draws. They
    are held against as chance: the interval and the p-value are for other documents and for one
    more draw, of which a setting that is no better than chance is one.

    Args:
        sums: Losses and differences by document; a setting begins with what is done and the size.
        compared: Which are compared with the others.
        size: What a size is called.
        resampling: Of the intervals.

    Returns:
        size; versus; draws, how many; difference with its interval; least and most of it over the
        draws; p_value of no difference, of draws as `one_more_draw` has it; p_corrected for the
        number of rows; verdict: `lower` or `higher` where that is under 0.05, `open` elsewhere,
        nothing under 30 documents.
    """
    rows = []
    for own in compared:
        others = dict[object, list[pd.DataFrame]]()
        for setting, documents in sums.items():
            if setting[0] != own[0] and setting[1] == own[1]:
                others.setdefault(setting[0], []).append(documents)
        for versus, draws in others.items():
            row = {size: own[1], "versus": versus}
            random = len(draws) > 1
            rows.append(row | loss_difference(sums[own], draws, resampling, random=random))
    return judged(pd.DataFrame(rows))


def judged(table: pd.DataFrame) -> pd.DataFrame:
    """With p-values corrected for the number of rows, and verdicts; see `against_table`."""
    corrected = holm(table["p_value"].to_numpy())
    verdict = np.where(table["difference"] < 0, "lower", "higher")
    verdict = np.select([np.isnan(corrected), corrected >= 0.05], ["", "open"], verdict)
    return table.assign(p_corrected=corrected, verdict=verdict)


def rise_of(row: pd.Series) -> str:
    """The difference of a row in words, with its interval if it has one."""
    text = nats(row["difference"])
    if pd.notna(row["difference_low"]):
        low, high = nats(row["difference_low"]), nats(row["difference_high"])
        text += f" (95% interval {low} to {high})"
    return text


def rises_of(rows: pd.DataFrame) -> str:
    """The difference of a row, or the least and the most of several draws."""
    least, most = nats(rows["difference"].min()), nats(rows["difference"].max())
    return least if len(rows) == 1 else f"{least} to {most} ({len(rows)} draws)"


def nats(value: float) -> str:
    """With its sign, but without one where it rounds to zero."""
    return f"{round(value, 3) + 0.0:+.3f}"
