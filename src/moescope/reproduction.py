"""Published tables, run again: a study beside the published values, and the same done right."""

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from moescope.captures.options import CaptureOptions
from moescope.captures.read import Capture
from moescope.config import build, read_yaml
from moescope.corpora.packing import Packing
from moescope.errors import OptionError, unknown
from moescope.models.load import load
from moescope.runs import Finding, Result, Run, library_versions
from moescope.scheduler import StudyConfig, study

RESULT = "published"
"""Name of the result that holds the comparison."""
CORRECTED = "corrected"
"""Folder within the run where the study is done right."""
FEWEST_VALUES = 10
"""Comparable values below which no agreement of ranks is quoted."""
FEWEST_ROWS = 3
"""Measured rows below which none is said to stand out."""

Label = int | str


@dataclass(frozen=True, kw_only=True)
class PublishedTable:
    """Values of a published table, and where our own table holds the same measure."""

    source: str
    """Study and table, as they are to be cited."""
    note: str
    """How the values came about, as far as known."""
    analysis: str
    """Analysis whose main table holds the same measure."""
    column: str
    """Its column in that table."""
    where: Mapping[str, Label] = field(default_factory=dict)
    """Columns of that table that have one value throughout the published one."""
    rows: str
    """Column that tells the published rows apart."""
    columns: str
    """Column that tells the published columns apart."""
    values: Mapping[Label, Mapping[Label, float]]
    """By row, then by column; cells without a value are left out."""
    beside: tuple[str, ...] = ()
    """More columns of our table, to be shown beside each value."""

    def frame(self) -> pd.DataFrame:
        """One line per published value."""
        return pd.DataFrame(
            {self.rows: row, self.columns: column, "published": value}
            for row, cells in self.values.items()
            for column, value in cells.items()
        )


@dataclass(frozen=True, kw_only=True)
class Correction:
    """The study without its known mistakes, on the same model and text."""

    packing: Packing
    """How documents become rows."""
    capture: CaptureOptions
    """Of how many tokens to record."""
    analyses: Mapping[str, Mapping[str, Any] | None]
    """Analyses by name, with their options."""
    beside: tuple[str, ...]
    """Columns of its table, to be shown beside each published value."""


@dataclass(frozen=True, kw_only=True)
class Reproduction(StudyConfig):
    """A published study: what it did, what it found, and how it is to be done."""

    model: str
    """The published study's model: Hub id, local folder, or name of a shipped model."""
    dtype: str = "auto"
    """Type of the weights: auto (as saved), float32, bfloat16 or float16."""
    published: PublishedTable
    """What was found."""
    corrected: Correction
    """How it is to be done."""

    def __post_init__(self) -> None:
        for part, analyses in (("analyses", self.analyses), (CORRECTED, self.corrected.analyses)):
            if self.published.analysis not in analyses:
                raise OptionError(
                    f"{part} leaves out the analysis that the published values belong to",
                    got=", ".join(analyses),
                    expected=self.published.analysis,
                )

    @property
    def corrected_study(self) -> StudyConfig:
        """The study done right."""
        done = self.corrected
        return StudyConfig(
            corpus=self.corpus, packing=done.packing, capture=done.capture, analyses=done.analyses
        )


def reproduce(
    file: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    model: str | None = None,
    corpus: Mapping[str, str] | None = None,
    device_map: str | None = None,
) -> Run:
    """Run a published study and the same study done right; put both beside the published values.

    What is done already is kept. `out/results/published` holds the comparison, `out/corrected` is
    the run of the study done right.

    Args:
        file: A YAML file with the fields of `Reproduction`.
        out: Run folder.
        model: Another model in the place of the published one; nothing is comparable then.
        corpus: Another text by domain; the same holds.
        device_map: Where the weights go, as `moescope.load` takes it.

    Raises:
        OptionError: Unknown or unfit options.
        ModelError: The model cannot be read.
        CaptureError: The folder holds a capture made with other options.
    """
    asked = build(Reproduction, read_yaml(Path(file)), str(file))
    ran = replace(asked, model=model or asked.model, corpus=corpus or asked.corpus)
    opened = load(ran.model, dtype=ran.dtype, device_map=device_map)
    runs = {
        RESULT: study(opened, out, ran),
        CORRECTED: study(opened, Path(out) / CORRECTED, ran.corrected_study),
    }
    found = {name: run.result(ran.published.analysis) for name, run in runs.items()}
    tables = {
        RESULT: comparison(ran.published, found[RESULT].table, _differences(asked, ran)),
        CORRECTED: _beside(ran.published, found[CORRECTED].table, ran.corrected.beside),
    }
    result = Result(
        name=RESULT,
        tables=tables,
        findings=[
            *findings(ran, tables[RESULT]),
            *(replace(said, text=f"Done right: {said.text}") for said in found[CORRECTED].findings),
        ],
        provenance={
            "model": ran.model,
            "reproduction": asdict(ran),
            "captures": {name: Capture(run).digest for name, run in runs.items()},
            "libraries": library_versions(),
        },
    )
    result.save(runs[RESULT].results_folder)
    return runs[RESULT]


def comparison(
    published: PublishedTable, table: pd.DataFrame, differences: tuple[str, ...]
) -> pd.DataFrame:
    """Published values beside measured ones.

    Args:
        published: The published table.
        table: Our table.
        differences: In what the run differs from the published study.

    Returns:
        A line per published value: its row and column, `published`, `measured`, `ratio` (measured
        over published), `comparable` (yes or no) and `why`, and the columns shown beside it.

    Raises:
        OptionError: Our table lacks a column.
    """
    frame = _beside(published, table, (published.column, *published.beside))
    frame = frame.rename(columns={published.column: "measured"})
    reasons = [
        "; ".join((*differences, *(() if np.isfinite(value) else ("not measured",))))
        for value in frame.measured
    ]
    facts = {
        "ratio": frame.measured / frame.published,
        "comparable": ["no" if reason else "yes" for reason in reasons],
        "why": [reason or "same model, text and protocol as far as known" for reason in reasons],
    }
    first = [published.rows, published.columns, "published", "measured"]
    return pd.concat([frame[first], pd.DataFrame(facts), frame.drop(columns=first)], axis=1)


def _differences(asked: Reproduction, ran: Reproduction) -> tuple[str, ...]:
    found = []
    if ran.model != asked.model:
        found.append(f"another model: {ran.model}")
    if ran.corpus != asked.corpus:
        found.append(f"another text: {', '.join(ran.corpus.values())}")
    return tuple(found)


def _beside(
    published: PublishedTable, table: pd.DataFrame, columns: tuple[str, ...]
) -> pd.DataFrame:
    """The published values, each with some columns of the line of our table it belongs to."""
    keys = [published.rows, published.columns]
    for name in (*published.where, *keys, *columns):
        if name not in table:
            raise unknown(f"column of {published.analysis}:", name, table.columns)
    for name, value in published.where.items():
        table = table[table[name] == value]
    ours = table[[*keys, *columns]]
    return published.frame().merge(ours, on=keys, how="left", validate="one_to_one")


def findings(reproduction: Reproduction, table: pd.DataFrame) -> list[Finding]:
    """What the comparison says in words, and what it cannot say."""
    measured = table[table.measured.notna()]
    comparable = measured[measured.comparable == "yes"]
    text = (
        f"{reproduction.published.source}: of {len(table)} published values {len(measured)} were "
        f"measured here, and {len(comparable)} of these are comparable."
    )
    if reasons := sorted(set(table[table.comparable == "no"].why)):
        text += f" Not comparable: {' / '.join(reasons)}."
    counts = {"values": len(table), "measured": len(measured), "comparable": len(comparable)}
    found = [Finding(text=text, numbers=counts)]
    if measured[reproduction.published.rows].nunique() >= FEWEST_ROWS:
        found.append(_standing_out(reproduction, measured))
    return [*found, _agreement(comparable)]


def _standing_out(reproduction: Reproduction, measured: pd.DataFrame) -> Finding:
    """Whether one row is far above the others, published and measured."""
    rows = reproduction.published.rows
    means = measured.groupby(rows)[["published", "measured"]].mean()
    said, numbers = [], dict[str, float | int | str]()
    for kind in ("published", "measured"):
        most = means[kind].idxmax()
        times = means[kind].max() / means[kind].drop(most).median()
        where = f"measured on {reproduction.model}" if kind == "measured" else kind
        said.append(f"{where}, that of {rows} {most}, {times:,.3g} times the median of the others")
        numbers |= {f"{kind}_largest": str(most), f"{kind}_times": float(times)}
    text = f"Largest mean of a row (over the same cells): {'; '.join(said)}."
    return Finding(text=text, numbers=numbers)


def _agreement(comparable: pd.DataFrame) -> Finding:
    count = len(comparable)
    if count < FEWEST_VALUES:
        text = f"{count} comparable values are too few to say whether their order agrees."
        return Finding(text=text, numbers={"comparable": count})
    rank = comparable.published.rank().corr(comparable.measured.rank())
    low, high = comparable.ratio.min(), comparable.ratio.max()
    text = (
        f"Rank correlation of the {count} comparable values: {rank:.2f}; measured is {low:.3g} to "
        f"{high:.3g} times the published value. Values of a row are not independent."
    )
    numbers = {"comparable": count, "rank_correlation": rank, "least": low, "most": high}
    return Finding(text=text, numbers=numbers)
