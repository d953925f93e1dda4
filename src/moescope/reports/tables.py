"""Tables of a result as sortable HTML; every cell is escaped."""

import html
import math
import numbers
from collections.abc import Mapping, Sequence

import pandas as pd

MOST_ROWS = 300
"""Rows of one table on the page; the files hold all of them."""
MOST_CELLS = 1_500
"""Cells of one table on the page."""
_MISSING = '<td class="none">\u2013</td>'


def table_html(frame: pd.DataFrame, caption: str) -> str:
    """A table whose headers sort it, in a box that scrolls by itself."""
    shown = frame.head(_most_rows(frame))
    heads = "".join(
        f'<th scope="col"><button type="button">{html.escape(str(name))}</button></th>'
        for name in frame.columns
    )
    columns = [_cells(shown[name]) for name in frame.columns]
    rows = "".join(f"<tr>{''.join(cells)}</tr>" for cells in zip(*columns, strict=True))
    return (
        f'<div class="table" role="region" tabindex="0" aria-label="{html.escape(caption)}">'
        f"<table><caption>{html.escape(caption)}</caption>"
        f"<thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def size_in_words(frame: pd.DataFrame) -> str:
    """Rows and columns, and what of them the page shows."""
    size = f"{len(frame):,} rows, {frame.shape[1]} columns"
    most = _most_rows(frame)
    return size if len(frame) <= most else f"{size}; the first {most} are shown"


def _most_rows(frame: pd.DataFrame) -> int:
    return min(MOST_ROWS, MOST_CELLS // max(1, frame.shape[1]))


def meanings_html(columns: Mapping[str, str], tables: Sequence[pd.DataFrame]) -> str:
    """What the columns mean, for those that occur in one of the tables."""
    present = {str(name) for frame in tables for name in frame.columns}
    items = "".join(
        f"<dt>{html.escape(names)}</dt><dd>{html.escape(meaning)}</dd>"
        for names, meaning in columns.items()
        if present & set(names.split(", "))
    )
    return f"<details><summary>What the columns mean</summary><dl>{items}</dl></details>"


def _cells(column: pd.Series) -> list[str]:
    decimals = _decimals(column)
    return [_cell(value, decimals) for value in column.astype(object)]


def _decimals(column: pd.Series) -> int:
    """Digits behind the point that suit the largest value of a column."""
    if not pd.api.types.is_float_dtype(column):
        return 0
    largest = column.abs().max()
    if not math.isfinite(largest) or largest == 0:
        return 3
    return max(0, min(4, 3 - math.floor(math.log10(largest))))


def _cell(value: object, decimals: int) -> str:
    if value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value)):
        return _MISSING
    if isinstance(value, bool):
        return f"<td>{'yes' if value else 'no'}</td>"
    if not isinstance(value, numbers.Real):
        return f"<td>{html.escape(str(value))}</td>"
    number = float(value)
    text = f"{number:,.{decimals}f}"
    if number and float(text.replace(",", "")) == 0:
        text = f"{number:.1e}"
    return f'<td data-value="{number:.6g}">{text.replace("-", chr(0x2212))}</td>'
