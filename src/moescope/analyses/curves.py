"""Measures with one value per layer, declared by the analyses that hold them.

`depth` and `moescope compare` show the curves of many analyses beside each other.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from moescope.runs import Result

COLUMNS = ["measure", "stack", "layer", "value", "low", "high", "n_tokens", "n_documents"]


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A measure that a table of a result holds once per layer."""

    measure: str
    """What it is, in words that need no table around them."""
    table: str
    """The table of the result."""
    value: str
    """Its column of values."""
    limits: tuple[str, str] | None = None
    """Its columns with the 95% limits of the values, if there are any."""
    where: Mapping[str, str | int] = field(default_factory=dict)
    """What its columns hold in the rows of this measure."""

    def read(self, result: Result) -> pd.DataFrame:
        """One row per stack and layer, with the columns of `COLUMNS`.

        None where the result, which may be of an earlier version, has no such table or columns.
        """
        frame = result.tables.get(self.table, pd.DataFrame())
        if not {self.value, *self.where} <= set(frame.columns):
            return pd.DataFrame(columns=COLUMNS)
        for column, wanted in self.where.items():
            frame = frame[frame[column] == wanted]
        low, high = self.limits or (None, None)
        found = pd.DataFrame(
            {"measure": self.measure, "stack": "decoder"}
            | {
                column: frame.get(given, np.nan)
                for column, given in (
                    ("layer", "layer"),
                    ("value", self.value),
                    ("low", low),
                    ("high", high),
                    ("n_tokens", "n_tokens"),
                    ("n_documents", "n_documents"),
                )
            }
        )
        if "stack" in frame:
            found["stack"] = frame["stack"]
        assert not found.duplicated(["stack", "layer"]).any(), f"{self.measure}: several per layer"
        return found[COLUMNS].reset_index(drop=True)
