"""Finished source experts of an alignment, kept so that an interrupted run goes on after them.

    RUN/results/align/KEY/L1E0-to-L2E4.safetensors   adapters
    RUN/results/align/KEY/expert-0.curves.parquet
    RUN/results/align/KEY/expert-0.parquet           written last: it says that the expert is done

KEY names everything the numbers depend on: capture, layers, targets, options.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from moescope.alignment.result import AlignmentResult
from moescope.experts.adapter import Adapter
from moescope.runs import Run, to_json, write_atomically


@dataclass(frozen=True, kw_only=True)
class Part:
    """One source expert against all its targets."""

    expert: int
    """Number of the source expert."""
    table: pd.DataFrame
    """A row per target."""
    curves: pd.DataFrame
    """Inner validation error along training."""
    adapters: Mapping[str, Adapter]
    """By name of the pair."""

    @classmethod
    def of(
        cls, source_layer: int, target_layer: int, expert: int, fits: Mapping[int, AlignmentResult]
    ) -> "Part":
        """Arrange the fits of one source expert, by target expert, as tables."""
        rows, curves, adapters = [], [], {}
        for target, fit in fits.items():
            pair = {"source_expert": expert, "target_expert": target}
            layers = {"source_layer": source_layer, "target_layer": target_layer}
            rows.append(layers | pair | fit.row())
            for kind, curve in (("pair", fit.curve), ("self", fit.self_curve)):
                curves += [pair | {"kind": kind} | point._asdict() for point in curve]
            if fit.adapter is not None:
                name = f"L{source_layer}E{expert}-to-L{target_layer}E{target}"
                adapters[name] = fit.adapter
        columns = ["source_expert", "target_expert", "kind", "step", "seconds", "fvu"]
        return cls(
            expert=expert,
            table=pd.DataFrame(rows),
            curves=pd.DataFrame(curves, columns=columns),
            adapters=adapters,
        )


class Parts:
    """The finished source experts of one set of options."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def of(cls, run: Run, key: object) -> "Parts":
        """The folder for everything that `key` names."""
        digest = hashlib.sha256(to_json(key).encode()).hexdigest()[:12]
        return cls(run.results_folder / "align" / digest)

    def done(self, expert: int) -> bool:
        """Whether a source expert is finished."""
        return self._table(expert).exists()

    def save(self, part: Part) -> None:
        """Keep a finished source expert."""
        for name, adapter in part.adapters.items():
            adapter.save(self.folder / f"{name}.safetensors")
        write_atomically(self._curves(part.expert), part.curves.to_parquet)
        write_atomically(self._table(part.expert), part.table.to_parquet)

    def load(self, expert: int) -> Part:
        """Tables of a finished source expert; its adapters stay on the disk."""
        return Part(
            expert=expert,
            table=pd.read_parquet(self._table(expert)),
            curves=pd.read_parquet(self._curves(expert)),
            adapters={},
        )

    def _table(self, expert: int) -> Path:
        return self.folder / f"expert-{expert}.parquet"

    def _curves(self, expert: int) -> Path:
        return self.folder / f"expert-{expert}.curves.parquet"
