"""Tables that swaps of blocks and swaps of experts share."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import ndtr, ndtri

from moescope.analyses.swap_blocks.options import SwapOptions
from moescope.analyses.swap_blocks.passes import Swaps
from moescope.evaluate.answers import answer_columns
from moescope.evaluate.totals import (
    Resampling,
    counts,
    difference_columns,
    mean_columns,
)
from moescope.measures.multiple_tests import holm

UNCHANGED = "unchanged"
"""Status of a row that is about the model as it is."""
REFUSED = "refused"
"""Status of a swap that cannot be made."""
SIGN = {"accuracy": -1, "loss": 1}
"""Where a change of a measure is for the worse."""
_NORMAL = float(ndtri(0.975))
_ONE_SIDED = 0.025


def measures_of(swaps: Swaps) -> list[str]:
    """What is measured: of questions also how many are answered."""
    return ["accuracy", "loss"] if swaps.reading.unit == "questions" else ["loss"]


def resampling_of(options: SwapOptions) -> Resampling:
    """How intervals are drawn."""
    return Resampling(resamples=options.bootstrap, seed=options.seed)


def change_table(
    swaps: Swaps, options: SwapOptions, unchanged: Sequence[dict[str, Any]] = ()
) -> pd.DataFrame:
    """One row per swap: measures and their differences from the model as it is.

    Args:
        swaps: The measurements.
        options: Resamples and margins.
        unchanged: Rows about the model as it is, by what tells them apart.
    """
    baseline = _columns(swaps, swaps.baseline.units, options)
    without = {name: np.nan for name in baseline if "difference_" in name}
    rows = [columns | baseline | without | {"status": UNCHANGED} for columns in unchanged]
    rows += [
        {**swap.columns} | _columns(swaps, measured.units, options)
        for swap, measured in swaps.measured.items()
    ]
    rows += [
        {**swap.columns, "status": REFUSED, "reason": reason}
        for swap, reason in swaps.refused.items()
    ]
    table = pd.DataFrame(rows)
    table["reason"] = table["reason"].fillna("") if "reason" in table else ""
    for measure in measures_of(swaps):
        _judge(table, measure, getattr(options, f"margin_{measure}"))
    return table


def _columns(swaps: Swaps, units: pd.DataFrame, options: SwapOptions) -> dict[str, object]:
    resampling, before = resampling_of(options), swaps.baseline.units
    if swaps.reading.unit == "questions":
        return answer_columns(units, before, resampling)
    frame = units.assign(loss_difference=units["loss"] - before["loss"])
    return {
        **mean_columns(frame, ["loss"], resampling),
        **difference_columns(frame, "loss_difference", resampling),
        **counts(frame, resampling),
    }


def _judge(table: pd.DataFrame, measure: str, margin: float) -> None:
    """Add p-values, corrected for the number of swaps, and what they say."""
    low, high = (table[f"{measure}_difference_{end}"] for end in ("low", "high"))
    middle, reach = ((high + low) / 2).to_numpy(), ((high - low) / 2).to_numpy()
    p_values = 2 * _beyond(np.abs(middle), reach)
    corrected = holm(p_values)
    # Of a change as large as the margin, on the side where it is nearer (Schuirmann 1987).
    within = holm(_beyond(margin - np.abs(middle), reach))
    found = pd.Series("open", table.index)
    found[(corrected < 0.05) & (SIGN[measure] * middle > 0)] = "worse"
    found[(corrected < 0.05) & (SIGN[measure] * middle < 0)] = "better"
    found[within < _ONE_SIDED] = "harmless"
    found[low.isna()] = ""
    table[f"{measure}_p_value"], table[f"{measure}_p_corrected"] = p_values, corrected
    table[f"{measure}_verdict"] = found


def _beyond(distance: np.ndarray, reach: np.ndarray) -> np.ndarray:
    """One-sided p-values of a normal distribution whose 95% limits are at this reach.

    Args:
        distance: Of the estimate from what is to be refuted; below 0 on its side.
        reach: Half the width of the intervals.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        z = np.where(distance == 0, 0, _NORMAL * distance / reach)
    return np.where(np.isnan(reach), np.nan, ndtr(-z))
