"""Finished source experts of an alignment, kept so that an interrupted run goes on after them.

    RUN/results/align/KEY/L1E0-to-L2E4.safetensors     adapters
    RUN/results/align/KEY/L1E0-to-L2.curves.parquet    a table of one source expert
    RUN/results/align/KEY/L1E0-to-L2.align.parquet     written last: its pairs are done
    RUN/results/align/KEY/L1E0-to-L2.learning.parquet, L1E0-to-L2.capacity.parquet if asked for
    RUN/results/align/KEY/L1E0-to-L2/                  fits of an expert that is not done

KEY names everything that the numbers depend on, but for the layers and the source expert.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from moescope.alignment.capacity import Capacity
from moescope.alignment.result import AlignmentResult
from moescope.analyses.align.options import LayerPair
from moescope.experts.adapter import Adapter
from moescope.runs import Run, read_table, write_atomically

PAIR = ["source_layer", "source_expert", "target_layer", "target_expert"]
"""Columns that name a pair of experts."""


@dataclass(frozen=True, kw_only=True)
class PartName:
    """One source expert against the experts of one target layer."""

    layers: LayerPair
    """Source and target layer."""
    expert: int
    """The source expert."""

    def __str__(self) -> str:
        return f"L{self.layers.source}E{self.expert}-to-L{self.layers.target}"

    def columns(self, target_expert: int) -> dict[str, int]:
        """The columns that name a pair of experts."""
        numbers = (self.layers.source, self.expert, self.layers.target, target_expert)
        return dict(zip(PAIR, numbers, strict=True))


class Parts:
    """The tables of the finished source experts of one set of options."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def of(cls, run: Run, key: Mapping[str, object]) -> "Parts":
        """The folder for everything that `key` names."""
        return cls(run.parts_folder("align", key))

    def done(self, part: PartName, table: str) -> bool:
        """Whether a table of a source expert is there."""
        return self._path(part, table).exists()

    def save(self, part: PartName, table: str, frame: pd.DataFrame) -> None:
        """Keep a table of a source expert."""
        write_atomically(self._path(part, table), frame.to_parquet)

    def save_adapters(self, part: PartName, adapters: Mapping[int, Adapter]) -> None:
        """Keep its adapters, by target expert."""
        for target, adapter in adapters.items():
            adapter.save(self.folder / f"{part}E{target}.safetensors")

    def load(self, part: PartName, table: str) -> pd.DataFrame:
        """A table of a source expert."""
        return read_table(self._path(part, table))

    def unfinished(self, part: PartName) -> Path:
        """Where the fits of a source expert are kept while it is not done."""
        return self.folder / str(part)

    def _path(self, part: PartName, table: str) -> Path:
        return self.folder / f"{part}.{table}.parquet"


def pair_table(part: PartName, fits: Mapping[int, AlignmentResult]) -> pd.DataFrame:
    """A row per target expert."""
    return pd.DataFrame([part.columns(target) | fit.row() for target, fit in fits.items()])


def curve_table(part: PartName, fits: Mapping[int, AlignmentResult]) -> pd.DataFrame:
    """Inner validation error along training."""
    rows: list[dict[str, Any]] = []
    for target, fit in fits.items():
        for kind, curve in (("pair", fit.curve), ("self", fit.self_curve)):
            rows += [part.columns(target) | {"kind": kind} | point._asdict() for point in curve]
    columns = [*PAIR, "kind", "step", "seconds", "fvu"]
    return pd.DataFrame(rows, columns=columns)


def capacity_table(
    part: PartName, capacities: Mapping[int, Capacity], expert_parameters: int
) -> pd.DataFrame:
    """Error against the parameters of the adapter, with the summaries of the pair in every row."""
    rows: list[dict[str, Any]] = []
    for target, capacity in capacities.items():
        summaries = {
            "advantage": capacity.advantage,
            "parameters_saved": capacity.parameters_saved,
        }
        for row in capacity.table():
            share = {"parameters_share": row["adapter_parameters"] / expert_parameters}
            rows.append(part.columns(target) | row | share | summaries)
    return pd.DataFrame(rows).astype({"seed": "Int64"}) if rows else pd.DataFrame()
