"""Can an expert of another layer stand in for this one, up to a change of input?"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool
from torch import Tensor

from moescope.alignment.options import SolverOptions
from moescope.analyses.align.cost import operations
from moescope.analyses.align.findings import findings
from moescope.analyses.align.layers import by_layers
from moescope.analyses.align.options import AlignOptions, LayerPair, experts_of, layer_pairs
from moescope.analyses.align.panels import Panel, distribution, principal_components
from moescope.analyses.align.parts import PartName, Parts
from moescope.analyses.align.tokens import Tokens, held_out_documents
from moescope.analyses.align.work import PairOfLayers
from moescope.analyses.material import Material
from moescope.analyses.registry import analysis
from moescope.captures.read import Capture
from moescope.models.view import MoEModel
from moescope.progress import track
from moescope.runs import Finding, Result

PARTS_VERSION = 4
"""Raised with every change of mathematics, so that no part computed before it is reused."""
PANEL_ROWS = 5_000
"""Tokens behind histograms and principal components."""


@analysis(
    question="Can experts of one layer be imitated by experts of another, up to a change of input?",
    source="MoE Align; held-out error, controls, score and intervals ours",
    needs={"inputs", "routing", "weights"},
    options=AlignOptions,
    work=operations,
)
def align(material: Material, options: AlignOptions) -> Result:
    """Fit an adapter for every pair of experts of one or more pairs of layers, beside controls.

    Resumes by source expert of a pair of layers.
    """
    capture, pairs = material.capture, layer_pairs(material.model, options)
    experts = {pair: _experts(material.model, pair, options) for pair in pairs}
    held_out = held_out_documents(capture, options.held_out_share, options.seed)
    tokens = Tokens(capture=capture, held_out=held_out, most=options.max_tokens, seed=options.seed)
    least = None
    if options.matched:
        least = tokens.least_training((pair.source, experts[pair][0]) for pair in pairs)
    parts = Parts.of(material.run, _key(capture, options, least))
    call = _Call(
        model=material.model,
        experts=experts,
        tokens=tokens,
        most_training=least,
        parts=parts,
        options=options,
    )
    finished = call.finish()
    tables = {name: _joined(parts, finished, name) for name in _tables(options)}
    panels = [(distribution(p), principal_components(p, options.seed)) for p in call.panels()]
    return Result(
        name="align",
        tables={
            **tables,
            "layers": by_layers(tables["align"]),
            "distributions": pd.concat([frame for frame, _ in panels], ignore_index=True),
            "pca": pd.concat([frame for _, frame in panels], ignore_index=True),
        },
        findings=[*findings(tables), *_unmeasured_domains(capture, held_out)],
        provenance={
            "seed": options.seed,
            "adapters": str(parts.folder.relative_to(material.run)),
            "matched_training_tokens": least,
        },
    )


def _experts(
    model: MoEModel, pair: LayerPair, options: AlignOptions
) -> tuple[list[int], list[int]]:
    source = experts_of(model.layer(pair.source), options.source_experts)
    return source, experts_of(model.layer(pair.target), options.target_experts)


def _tables(options: AlignOptions) -> list[str]:
    names = ["align", "curves"]
    names += ["learning"] if options.learning_curve else []
    return names + (["capacity"] if options.capacity else [])


def _joined(parts: Parts, names: Iterable[PartName], table: str) -> pd.DataFrame:
    frames = [parts.load(name, table) for name in names]
    return pd.concat([f for f in frames if len(f)] or frames[:1], ignore_index=True)


def _unmeasured_domains(capture: Capture, held_out: Bool[Tensor, " documents"]) -> list[Finding]:
    measured = set(capture.document_domains[held_out].tolist())
    missing = [name for n, name in enumerate(capture.domains) if n not in measured]
    if not missing:
        return []
    text = f"The errors say nothing about {', '.join(missing)}: one document cannot be held out."
    return [Finding(text=text)]


_FREE = ("source", "target", "source_experts", "learning_curve", "capacity", "matched")
"""Options that no kept table of a source expert depends on, or that are known otherwise."""


def _key(capture: Capture, options: AlignOptions, most_training: int | None) -> dict[str, object]:
    """What a finished source expert depends on, but for itself and the layers."""
    fixed: dict[str, Any] = {k: v for k, v in asdict(options).items() if k not in _FREE}
    return {
        "parts": PARTS_VERSION,
        "capture": capture.digest,
        "options": fixed | {"target_experts": list(dict.fromkeys(options.target_experts))},
        "most_training": most_training,
        "solver": asdict(SolverOptions()),
    }


@dataclass(frozen=True, kw_only=True, eq=False)
class _Call:
    """Everything that all pairs of layers of one call share."""

    model: MoEModel
    experts: dict[LayerPair, tuple[list[int], list[int]]]
    """Source and target experts of each pair of layers."""
    tokens: Tokens
    most_training: int | None
    parts: Parts
    options: AlignOptions

    def finish(self) -> list[PartName]:
        """Compute what is missing; the names of all that is there then."""
        total = sum(len(sources) for sources, _ in self.experts.values())
        done = []
        for work, part in track(self._todo(), "aligning experts", total=total):
            work.finish(part)
            done.append(part)
        return done

    def _todo(self) -> Iterator[tuple[PairOfLayers, PartName]]:
        """One source expert after the other; tensors of one pair of layers at a time."""
        for pair, (source_experts, target_experts) in self.experts.items():
            work = PairOfLayers(
                source=self.model.layer(pair.source),
                target=self.model.layer(pair.target),
                source_experts=source_experts,
                target_experts=target_experts,
                tokens=self.tokens,
                most_training=self.most_training,
                parts=self.parts,
                options=self.options,
            )
            for part in work.part_names():
                yield work, part

    def panels(self) -> Iterator[Panel]:
        """Inputs of every layer, and outputs of the source experts, some of each."""
        sources = {pair.source: experts for pair, (experts, _) in self.experts.items()}
        capture, seed = self.tokens.capture, self.options.seed
        for layer in sorted({layer for pair in self.experts for layer in pair}):
            inputs = capture.inputs(layer).values
            chosen = np.random.default_rng(seed).permutation(len(inputs))[:PANEL_ROWS]
            yield Panel(layer=layer, name=f"input of layer {layer}", values=inputs[chosen].float())
            if layer in sources:
                name = f"expert outputs of layer {layer}"
                yield Panel(layer=layer, name=name, values=self._outputs(layer, sources[layer]))

    def _outputs(self, layer: int, experts: list[int]) -> Tensor:
        """[tokens, hidden] of as many tokens of each expert as fill a panel."""
        each = math.ceil(PANEL_ROWS / len(experts))
        outputs = []
        for expert, recorded in self.tokens.capture.expert_samples(layer, experts).items():
            order = np.random.default_rng(self.options.seed).permutation(len(recorded.tokens))
            weights = self.model.layer(layer).expert_weights(expert)
            weights = weights.to(dtype=torch.float32, device="cpu")
            outputs.append(weights(recorded.values[order[:each]].float()))
        return torch.cat(outputs)
