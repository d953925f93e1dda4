"""How alike experts are as matrices, and whether router rows follow them (A Closer Look)."""

from typing import Any

import pandas as pd

from moescope.analyses.curves import Curve
from moescope.analyses.material import Material
from moescope.analyses.registry import analysis
from moescope.analyses.weights.ancestor import ancestor_rows
from moescope.analyses.weights.components import expert_positions, neuron_rows
from moescope.analyses.weights.findings import findings
from moescope.analyses.weights.matching import matching_rows
from moescope.analyses.weights.options import WeightsOptions
from moescope.analyses.weights.pairs import (
    between_row,
    cells_across,
    cells_within,
    layer_rows,
    pair_frame,
)
from moescope.analyses.weights.reading import ALL, LayerExperts, Summary, reading
from moescope.analyses.weights.router import (
    Association,
    associations,
    router_table,
    together_table,
)
from moescope.measures.similarity import inner_products
from moescope.models.on_disk import StoredLayers, on_disk
from moescope.progress import track
from moescope.runs import Result

_LIMITS = ("low", "high")


def of_checkpoint(material: Material, options: WeightsOptions) -> dict[str, Any]:
    """What a result rests on: a checkpoint, and that of the ancestor."""
    stored = layers_of(material, options)
    basis = {
        "model": stored.name,
        "model_revision": stored.revision,
        "weights_fingerprint": stored.fingerprint,
    }
    if options.ancestor is not None:
        basis["ancestor_fingerprint"] = _ancestor(options.ancestor).fingerprint
    return basis


@analysis(
    question="How alike are experts as matrices, and do router rows follow their neurons?",
    source="A Closer Look into MoE (static parameters); joint matching, nulls, intervals ours",
    needs={"weights"},
    options=WeightsOptions,
    basis=of_checkpoint,
    curves=(
        Curve(
            measure="cosine of experts, as matrices",
            table="weights",
            value="mean",
            limits=_LIMITS,
            where={"measure": "cosine", "matrix": ALL},
        ),
        Curve(
            measure="cosine of experts, means of neurons",
            table="weights",
            value="mean",
            limits=_LIMITS,
            where={"measure": "average", "matrix": ALL},
        ),
        Curve(
            measure="cosine of experts, matched neurons",
            table="matching",
            value="mean",
            limits=_LIMITS,
            where={"measure": "matched", "apart": 0},
        ),
        Curve(
            measure="r, router rows with gate neurons",
            table="router",
            value="r",
            where={"form": "average", "matrix": "gate"},
        ),
    ),
)
def weights(material: Material, options: WeightsOptions) -> Result:
    """Likeness within and across layers, matched neurons, router rows, principal components."""
    ancestor = None if options.ancestor is None else _ancestor(options.ancestor)
    return compared(layers_of(material, options), options, ancestor)


def layers_of(material: Material, options: WeightsOptions) -> StoredLayers:
    """Those of the checkpoint that is named, or of the captured model."""
    if options.checkpoint is None:
        return material.layers
    return on_disk(options.checkpoint, revision=options.revision)


def _ancestor(name: str) -> StoredLayers:
    return on_disk(name, dense_as_experts=True)


def compared(
    stored: StoredLayers, options: WeightsOptions, ancestor: StoredLayers | None = None
) -> Result:
    """The same for any layers; those of two are in memory at a time.

    Raises:
        ModelError: Weights are damaged, missing, or no plain numbers.
    """
    tables = _Tables(options)
    for layer in track(stored.layers, "weights: layers"):
        with reading(stored, layer) as experts:
            tables.add_layer(experts, ancestor)
    for index, layer in enumerate(track(stored.layers, "weights: pairs of layers")):
        others = stored.layers[index + 1 :][: options.reach]
        if others:
            with reading(stored, layer, tables.summaries[index]) as one:
                for later, other in enumerate(others, start=index + 1):
                    with reading(stored, other, tables.summaries[later]) as two:
                        tables.add_pair(one, two)
    frames = tables.frames()
    return Result(
        name="weights",
        tables=frames,
        findings=findings(frames),
        provenance={"seed": options.seed},
    )


class _Tables:
    """Tables that grow as layers are read."""

    def __init__(self, options: WeightsOptions) -> None:
        self.options = options
        self.summaries: list[Summary] = []
        self._rows: dict[str, list[dict[str, Any]]] = {}
        self._frames: dict[str, list[pd.DataFrame]] = {"pairs": [], "positions": []}
        self._associations: list[Association] = []
        self._cells_across = 0

    def add_layer(self, experts: LayerExperts, ancestor: StoredLayers | None) -> None:
        """Everything about one layer alone."""
        summary, options = experts.summary, self.options
        self.summaries.append(summary)
        products = {name: inner_products(some, some) for name, some in experts.matrices.items()}
        cells = cells_within(summary, products)
        self._add("weights", layer_rows(summary, cells))
        self._associations += associations(summary, cells, options)
        self._add("layers", [between_row(summary, summary, cells)])
        self._add("matching", matching_rows(experts, experts, options))
        self._add("neurons", neuron_rows(experts))
        self._frames["pairs"].append(pair_frame(summary, summary, cells))
        self._frames["positions"].append(expert_positions(summary, cells))
        if ancestor is not None:
            self._add("ancestor", ancestor_rows(experts, ancestor, options))

    def add_pair(self, one: LayerExperts, other: LayerExperts) -> None:
        """Everything about two layers."""
        cells = cells_across(one, other)
        self._add("layers", [between_row(one.summary, other.summary, cells)])
        self._cells_across += len(one.summary.experts) * len(other.summary.experts)
        if self._cells_across <= self.options.cells:
            self._frames["pairs"].append(pair_frame(one.summary, other.summary, cells))
        if self._are_neighbours(one.summary, other.summary):
            self._add("matching", matching_rows(one, other, self.options))

    def frames(self) -> dict[str, pd.DataFrame]:
        """The tables; those across layers one by one only where all of them could be kept."""
        pairs = pd.concat(self._frames["pairs"], ignore_index=True)
        if self._cells_across > self.options.cells:
            pairs = pairs[
                (pairs["layer"] == pairs["other_layer"]) & (pairs["stack"] == pairs["other_stack"])
            ]
        tables = {name: pd.DataFrame(rows) for name, rows in self._rows.items()}
        tables["pairs"] = pairs
        tables["positions"] = pd.concat(self._frames["positions"], ignore_index=True)
        tables["router"] = router_table(self._associations)
        tables["router_together"] = together_table(self._associations)
        return tables

    def _add(self, table: str, rows: list[dict[str, Any]]) -> None:
        self._rows.setdefault(table, []).extend(rows)

    def _are_neighbours(self, one: Summary, other: Summary) -> bool:
        return self.summaries.index(other) - self.summaries.index(one) == 1 and (
            one.stack == other.stack
        )
