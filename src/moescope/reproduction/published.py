"""A published table, and our values of the same measure beside it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from moescope.errors import unknown
from moescope.runs import Result

Label = int | str


@dataclass(frozen=True, kw_only=True)
class PublishedTable:
    """Values of a published table, and where our own tables hold the same measure."""

    source: str
    """Study and table, as they are to be cited."""
    note: str
    """How the values came about, as far as known."""
    analysis: str
    """Analysis whose result holds the same measure."""
    table: str = ""
    """Which of its tables; the main one if left out."""
    column: str
    """Its column in that table."""
    other_columns: Mapping[Label, str] = field(default_factory=dict)
    """Published rows of another measure, with its column."""
    where: Mapping[str, Label] = field(default_factory=dict)
    """Columns of that table that have one value throughout the published one."""
    mean_over: str = ""
    """Column over whose values ours is averaged, as the published values are: a layer."""
    rows: str
    """Column that tells the published rows apart."""
    columns: str
    """Column that tells the published columns apart."""
    values: Mapping[Label, Mapping[Label, float]]
    """By row, then by column; cells without a value are left out."""
    unlike: Mapping[Label, str] = field(default_factory=dict)
    """Published rows that ours are known to differ from, and in what."""
    beside: tuple[str, ...] = ()
    """More columns of our table, to be shown beside each value."""

    def frame(self) -> pd.DataFrame:
        """One line per published value, with the column that holds its measure."""
        return pd.DataFrame(
            {
                self.rows: row,
                self.columns: column,
                "measure": self.other_columns.get(row, self.column),
                "published": value,
            }
            for row, cells in self.values.items()
            for column, value in cells.items()
        )

    def ours(self, result: Result) -> pd.DataFrame:
        """Our table.

        Raises:
            OptionError: The result has no such table.
        """
        name = self.table or result.name
        if name not in result.tables:
            raise unknown(f"table of {result.name}:", name, result.tables)
        return result.tables[name]


def comparison(
    published: PublishedTable, table: pd.DataFrame, differences: Sequence[str]
) -> pd.DataFrame:
    """Published values beside measured ones.

    Args:
        published: The published table.
        table: Our table.
        differences: In what the run differs from the published study.

    Returns:
        A line per published value: its row and column, `measure`, `published`, `measured`, `ratio`
        (measured over published), `comparable` (yes or no) and `why`, and the columns shown beside.

    Raises:
        OptionError: Our table lacks a column.
    """
    measures = list(dict.fromkeys((published.column, *published.other_columns.values())))
    frame = beside(published, table, (*measures, *published.beside), published.where)
    measured = [line[line["measure"]] for _, line in frame.iterrows()]
    frame["measured"] = np.array(measured, dtype=float)
    reasons = [
        "; ".join((*differences, *_reasons(published, line))) for _, line in frame.iterrows()
    ]
    facts = {
        "ratio": frame["measured"] / frame["published"],
        "comparable": ["no" if reason else "yes" for reason in reasons],
        "why": [reason or "same model, text and protocol as far as known" for reason in reasons],
    }
    first = [published.rows, published.columns, "measure", "published", "measured"]
    return pd.concat(
        [frame[first], pd.DataFrame(facts), frame[list(published.beside)]], axis="columns"
    )


def _reasons(published: PublishedTable, line: pd.Series) -> list[str]:
    row = line[published.rows]
    known = [published.unlike[row]] if row in published.unlike else []
    return known if np.isfinite(line["measured"]) else [*known, "not measured"]


def beside(
    published: PublishedTable,
    table: pd.DataFrame,
    columns: Sequence[str],
    where: Mapping[str, Label],
) -> pd.DataFrame:
    """The published values, each with some columns of the lines of our table it belongs to.

    Raises:
        OptionError: Our table lacks a column.
    """
    keys = [published.rows, published.columns]
    over = [published.mean_over] if published.mean_over else []
    for name in (*where, *keys, *columns, *over):
        if name not in table:
            raise unknown(f"column of {published.analysis}:", name, table.columns)
    for name, value in where.items():
        table = table[table[name] == value]
    table = table[[*keys, *columns]]
    if over:
        table = table.groupby(keys, as_index=False).mean()
    return published.frame().merge(table, on=keys, how="left")
