"""One imitated expert after the other: screened, fitted, and kept so that a run can go on.

    RUN/results/atlas/KEY/L1E0.parquet      screening of an imitated expert

KEY names everything that screening depends on, but for the imitated expert. Converged fits are kept
one by one, where the other analyses find them too: see `moescope.analyses.fits`.
"""

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from moescope.analyses.atlas.cost import (
    Shape,
    fits_of,
    pair_operations,
    short_operations,
    source_operations,
)
from moescope.analyses.atlas.options import AtlasOptions
from moescope.analyses.atlas.screening import Screening, targets_seen
from moescope.analyses.atlas.selection import with_stages
from moescope.analyses.atlas.tables import PAIR, joined
from moescope.analyses.fits import Fits, Source, Target
from moescope.models.view import MoELayer
from moescope.runs import write_atomically

SCREENING_VERSION = 1
"""Raised with every change of mathematics, so that nothing screened before it is reused."""
_NOT_OF_SCREENING = ("survivors", "rejected", "form", "rank", "steps", "controls")


@dataclass(frozen=True, kw_only=True, eq=False)
class Sources:
    """Everything that the imitated experts of one call share."""

    fits: Fits
    """Converged fits of the run."""
    experts: Mapping[int, list[int]]
    """Experts of each layer that take part."""
    options: AtlasOptions
    """How to screen, and what to fit."""

    def pairs(self, source: Source) -> tuple[pd.DataFrame, list[dict[str, Any]]]:
        """All pairs of an imitated expert, and what it cost to compute what was missing.

        Returns:
            A row per target, with the columns of `AlignmentResult` where there is a converged fit;
            and a row per kind of fit with number, operations and seconds.
        """
        screened, costs = self._screened(source)
        staged = with_stages(screened, self.options)
        fitted = staged[(staged["stage"] == "converged") | staged["sampled"]]
        numbers = fitted[["target_layer", "target_expert"]].to_numpy().tolist()
        targets = [Target(*pair) for pair in numbers]
        before, began = self._kept(source), time.perf_counter()
        found = self.fits.between(source, targets)
        seconds = time.perf_counter() - began
        new = {path.stem.partition("-to-")[2] for path in self._kept(source) - before}
        costs += self._converged_cost(source, new, seconds)
        rows = [
            dict(zip(PAIR, (*source, target.layer, target.expert), strict=True))
            | {"inner_fvu": fit.inner_fvu}
            | fit.row
            for target, fit in found.items()
        ]
        return joined(staged, rows), costs

    def _screened(self, source: Source) -> tuple[pd.DataFrame, list[dict[str, Any]]]:
        path = self._folder / f"{source}.parquet"
        if path.exists():
            return pd.read_parquet(path), []
        screening = self._screening
        train, held_out = self.fits.samples(source)
        began = time.perf_counter()
        screened = screening.screen(source, train, held_out)
        seconds = time.perf_counter() - began
        write_atomically(path, screened.to_parquet)
        short = screened[screened["short_fvu"].notna()]
        operations = 0.0
        for layer in short["target_layer"].tolist():
            operations += short_operations(self._shape(layer), self.options, len(train))
        return screened, _cost("short", len(short), operations, seconds)

    def _converged_cost(
        self, source: Source, new: set[str], seconds: float
    ) -> list[dict[str, Any]]:
        """Of the targets of these names."""
        if not new:
            return []
        train = len(self.fits.samples(source)[0])
        operations = source_operations(self._shape(source.layer), self.options, train)
        for layer, chosen in self.experts.items():
            number = sum(str(Target(layer, expert)) in new for expert in chosen)
            operations += number * pair_operations(self._shape(layer), self.options, train)
        return _cost("converged", fits_of(len(new), self.options), operations, seconds)

    def _kept(self, source: Source) -> set[Path]:
        """Records of the fits of a source that lie in the run folder."""
        results = self.fits.material.run.results_folder
        return set(results.glob(f"fits/*/{source}-to-*.json"))

    @cached_property
    def _screening(self) -> Screening:
        model = self.fits.material.model
        return Screening(
            model=model,
            targets=targets_seen(model, self.fits.tokens, self.experts),
            options=self.options,
        )

    def _shape(self, layer: int) -> Shape:
        return _shape(self.fits.material.model.layer(layer))

    @cached_property
    def _folder(self) -> Path:
        options = {k: v for k, v in asdict(self.options).items() if k not in _NOT_OF_SCREENING}
        key = {
            "version": SCREENING_VERSION,
            "capture": self.fits.tokens.capture.digest,
            "options": options | {"least": self.options.survivors or 1},
        }
        return self.fits.material.run.parts_folder("atlas", key)


def _shape(layer: MoELayer) -> Shape:
    return Shape(layer.num_experts, layer.hidden_size, layer.intermediate_size)


def _cost(kind: str, fits: int, operations: float, seconds: float) -> list[dict[str, Any]]:
    return [{"fits_of": kind, "fits": fits, "operations": operations, "seconds": seconds}]
