"""Stand-ins against one another, on the same tokens."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd

from moescope.analyses.fits import Source
from moescope.analyses.substitute.stand_ins import By, Kind
from moescope.analyses.substitute.tables import POOLED, Measured, with_means
from moescope.evaluate.draws import loss_difference
from moescope.evaluate.totals import Resampling
from moescope.measures.multiple_tests import holm

COMPARED: tuple[tuple[By, By], ...] = (
    ("best", "zero"),
    ("best", "mean"),
    ("best", "linear"),
    ("drawn", "random"),
    ("drawn", "same_layer"),
)
"""What is held against what: random experts and those of the same layer against the best of
equally many experts of other layers."""
_LEVEL = 0.05


def against_table(measured: Measured, resampling: Resampling) -> pd.DataFrame:
    """Stand-ins against one another, on the same tokens of all domains.

    Returns:
        One row per expert (and the mean over them) and comparison. difference, of the losses, with
        its interval over documents and, of random experts, over what one more draw of them would
        have cost; least and most of it over the draws; p_value, two-sided; p_corrected, by Holm
        among the comparisons of the mean, and among those of all experts one by one; verdict:
        "better" or "worse", "open" where neither can be told, or nothing under 30 documents or two
        draws.
    """
    tables = []
    for sources in ([None], list(measured.chosen)):
        rows = [row for source in sources for row in _comparisons(measured, source, resampling)]
        table = pd.DataFrame(rows)
        if rows:
            table["p_corrected"] = holm(table["p_value"].to_numpy(dtype=float))
            table["verdict"] = _verdicts(table)
        tables.append(table)
    return pd.concat(tables, ignore_index=True)


def _comparisons(
    measured: Measured, source: Source | None, resampling: Resampling
) -> Iterator[dict[str, Any]]:
    present = with_means(measured.kinds)
    for kind in present:
        for by, than in COMPARED:
            other = Kind(than, kind.form if than in ("random", "same_layer") else "")
            # What has no adapter is the same before and after adapters were trained further.
            other = other._replace(tuned=kind.tuned and than not in ("zero", "mean"))
            if kind.by != by or other not in present:
                continue
            own = measured.sums(source, kind)
            others = [measured.sums(source, k) for k in measured.draws(other)]
            yield {
                "source": POOLED if source is None else str(source),
                "form": kind.form,
                "tuned": kind.tuned,
                "by": by,
                "than": than,
                **loss_difference(own, others, resampling, random=than == "random"),
            }


def _verdicts(table: pd.DataFrame) -> np.ndarray:
    corrected = table["p_corrected"].to_numpy()
    side = np.where(table["difference"] < 0, "better", "worse")
    return np.select([np.isnan(corrected), corrected >= _LEVEL], ["", "open"], side)
