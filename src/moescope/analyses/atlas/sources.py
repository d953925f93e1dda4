"""One imitated expert after the other: screened, fitted, and kept so that a run can go on.

    RUN/results/atlas/KEY/L1E0.parquet              screening of an imitated expert
    RUN/results/atlas/KEY/outputs-L4.safetensors    what the experts of a layer put out

KEY names everything that screening depends on, but for the imitated expert. Converged fits are kept
one by one, where the other analyses find them too: see `moescope.analyses.fits`.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from torch import Tensor

from moescope.alignment.checks import refusal
from moescope.analyses.atlas.chance import PAIR, random_rows
from moescope.analyses.atlas.cost import (
    Shape,
    fits_of,
    kinds_of,
    pair_operations,
    short_operations,
    source_operations,
)
from moescope.analyses.atlas.options import AtlasOptions
from moescope.analyses.atlas.screening import ROWS, Screening
from moescope.analyses.atlas.selection import with_stages
from moescope.analyses.atlas.tables import joined
from moescope.analyses.expert_tensors import ExpertTensors
from moescope.analyses.fits import Fits, Source, Target
from moescope.models.view import MoELayer
from moescope.runs import read_table, write_atomically

SCREENING_VERSION = 1
"""Raised with every change of mathematics, so that nothing screened before it is reused."""
_NOT_OF_SCREENING = ("survivors", "rejected", "form", "rank", "steps", "controls")


class Pairs(NamedTuple):
    """All pairs of an imitated expert."""

    table: pd.DataFrame
    """A row per target, with the columns of `AlignmentResult` where there is a converged fit."""
    random: list[dict[str, Any]]
    """A row per random expert beside a converged fit."""
    costs: list[dict[str, Any]]
    """A row per kind of fit with number, operations and seconds of what was computed."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Sources:
    """Everything that the imitated experts of one call share."""

    fits: Fits
    """Converged fits of the run."""
    experts: Mapping[int, list[int]]
    """Experts of each layer that take part."""
    options: AtlasOptions
    """How to screen, and what to fit."""

    def pairs(self, source: Source) -> "Pairs":
        """All pairs of an imitated expert; fits what is missing."""
        screened, costs = self._screened(source)
        staged = with_stages(screened, self.options)
        fitted = staged[(staged["stage"] == "converged") | staged["sampled"]]
        numbers = fitted[["target_layer", "target_expert"]].to_numpy().tolist()
        targets = [Target(*pair) for pair in numbers]
        missing, began = self.fits.missing(source, targets), time.perf_counter()
        found = self.fits.between(source, targets)
        seconds = time.perf_counter() - began
        rows, random = [], []
        for target, fit in found.items():
            pair = (*source, target.layer, target.expert)
            named = dict(zip(PAIR, pair, strict=True))
            rows.append(named | {"inner_fvu": fit.inner_fvu} | fit.row)
            random += random_rows(pair, fit.random)
        costs += self._converged_cost(source, missing, seconds)
        return Pairs(table=joined(staged, rows), random=random, costs=costs)

    def _screened(self, source: Source) -> tuple[pd.DataFrame, list[dict[str, Any]]]:
        path = self._folder / f"{source}.parquet"
        if path.exists():
            return read_table(path), []
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
        self, source: Source, fitted: Sequence[Target], seconds: float
    ) -> list[dict[str, Any]]:
        if not fitted:
            return []
        train, held_out = self.fits.samples(source)
        if refusal(train, held_out) is not None:
            return []
        shapes = [self._shape(target.layer) for target in fitted]
        operations = source_operations(
            self._shape(source.layer), shapes, self.options, len(train)
        ) + sum(pair_operations(shape, self.options, len(train)) for shape in shapes)
        number = fits_of(len(fitted), kinds_of(shapes), self.options)
        return _cost("converged", number, operations, seconds)

    @cached_property
    def _screening(self) -> Screening:
        return Screening(
            fits=self.fits,
            experts=self.experts,
            outputs=ExpertTensors(folder=self._folder, name="outputs", compute=self._outputs),
            options=self.options,
        )

    def _outputs(self, layer: int) -> dict[int, Tensor]:
        """What the experts of a layer that take part make of some of their own inputs."""
        experts = self.experts[layer]
        inputs = [self.fits.inputs(Target(layer, expert), ROWS) for expert in experts]
        of = [self.fits.weights(Target(layer, expert)) for expert in experts]
        return {e: weights(x) for e, weights, x in zip(experts, of, inputs, strict=True)}

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
