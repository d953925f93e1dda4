"""The fits of one pair of layers, each source expert finished and kept by itself."""

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pandas as pd
from jaxtyping import Float
from torch import Tensor

from moescope.alignment.capacity import capacity_curve
from moescope.alignment.learning import SHARES, learning_curve
from moescope.alignment.outcomes import OutcomeFolder
from moescope.alignment.pairs import fit_pairs
from moescope.alignment.samples import Samples
from moescope.analyses.align.options import AlignOptions, LayerPair
from moescope.analyses.align.parts import (
    PartName,
    Parts,
    capacity_table,
    curve_table,
    pair_table,
)
from moescope.analyses.align.tokens import Tokens
from moescope.captures.read import Recorded
from moescope.experts.weights import ExpertWeights
from moescope.models.view import MoELayer


@dataclass(frozen=True, kw_only=True, eq=False)
class PairOfLayers:
    """Source experts of one layer against all chosen experts of another."""

    source: MoELayer
    """Layer of the imitated experts."""
    target: MoELayer
    """Layer of the imitating experts."""
    source_experts: list[int]
    """Numbers of the imitated experts."""
    target_experts: list[int]
    """Numbers of the imitating experts."""
    tokens: Tokens
    """Which tokens are used for what."""
    most_training: int | None
    """Most training tokens of a source expert; None for all there are."""
    parts: Parts
    """What is finished."""
    options: AlignOptions
    """How to fit."""

    def part_names(self) -> list[PartName]:
        """One for each source expert."""
        layers = LayerPair(self.source.index, self.target.index)
        return [PartName(layers=layers, expert=expert) for expert in self.source_experts]

    def finish(self, part: PartName) -> None:
        """Compute and keep what is missing of one source expert."""
        if not self.parts.done(part, "align"):
            self._fit(part)
        if self.options.learning_curve and not self.parts.done(part, "learning"):
            self.parts.save(part, "learning", pd.DataFrame(self._learning(part)))
        if self.options.capacity and not self.parts.done(part, "capacity"):
            self.parts.save(part, "capacity", self._capacity(part))

    def _fit(self, part: PartName) -> None:
        train, held_out = self._split(part)
        unfinished = self.parts.unfinished(part)
        found = fit_pairs(
            train,
            held_out,
            self._targets,
            outcomes=OutcomeFolder(unfinished),
            **self._about_source(part),
        )
        fits = {e: found[name] for e, name in self._names.items()}
        adapters = {e: fit.adapter for e, fit in fits.items() if fit.adapter is not None}
        self.parts.save_adapters(part, adapters)
        self.parts.save(part, "curves", curve_table(part, fits))
        self.parts.save(part, "align", pair_table(part, fits))
        shutil.rmtree(unfinished, ignore_errors=True)

    def _learning(self, part: PartName) -> Iterator[dict[str, Any]]:
        if not self._measured(part):
            return
        train, held_out = self._split(part)
        rows = learning_curve(
            train,
            held_out,
            self._targets,
            sizes=[max(1, len(train) // share) for share in SHARES],
            **self._about_source(part),
        )
        numbers = {name: e for e, name in self._names.items()}
        for row in rows:
            rest = {key: value for key, value in row.items() if key != "target"}
            if row["n_train"] < len(train):
                yield part.columns(numbers[row["target"]]) | rest
        for again in self.parts.load(part, "align").to_dict("records"):
            yield {str(key): value for key, value in again.items()}

    def _capacity(self, part: PartName) -> pd.DataFrame:
        train, held_out = self._split(part)
        budget = self.options.budget_seconds
        each = None if budget is None else budget / len(self.target_experts)
        return capacity_table(
            part,
            {
                e: capacity_curve(
                    train,
                    held_out,
                    self._targets[self._names[e]],
                    source=self.source.expert_weights(part.expert),
                    source_name=_name(self.source, part.expert),
                    target_name=self._names[e],
                    target_inputs=self._target_inputs.get(e),
                    options=self.options.fit_options(each),
                )
                for e in self._measured(part)
            },
            self._targets[self._names[self.target_experts[0]]].num_parameters,
        )

    def _measured(self, part: PartName) -> list[int]:
        """Target experts for which the pair has numbers."""
        table = self.parts.load(part, "align")
        return [int(e) for e in table.target_expert[table.fvu.notna()]]

    def _about_source(self, part: PartName) -> dict[str, Any]:
        """What all fits of a source expert are told of it and of the targets."""
        return {
            "source": self.source.expert_weights(part.expert),
            "source_name": _name(self.source, part.expert),
            "target_inputs": {self._names[e]: x for e, x in self._target_inputs.items()},
            "options": self.options.fit_options(self.options.budget_seconds),
        }

    def _split(self, part: PartName) -> tuple[Samples, Samples]:
        recorded = self._recorded[part.expert]
        return self.tokens.samples(self.source, part.expert, recorded, self.most_training)

    @cached_property
    def _names(self) -> Mapping[int, str]:
        return {e: _name(self.target, e) for e in self.target_experts}

    @cached_property
    def _targets(self) -> Mapping[str, ExpertWeights]:
        return {name: self.target.expert_weights(e) for e, name in self._names.items()}

    @cached_property
    def _recorded(self) -> Mapping[int, Recorded]:
        return self.tokens.capture.expert_samples(self.source.index, self.source_experts)

    @cached_property
    def _target_inputs(self) -> Mapping[int, Float[Tensor, "tokens hidden"]]:
        inputs = self.tokens.target_inputs(self.target.index, self.target_experts)
        return {e: x for e, x in inputs.items() if len(x)}


def _name(layer: MoELayer, expert: int) -> str:
    return f"L{layer.index}E{expert}"
