"""Can an expert of another layer stand in for this one, up to a change of input?"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from moescope.alignment.optimiser import PRODUCTS
from moescope.alignment.options import RANDOM_SEEDS, FitOptions, SolverOptions
from moescope.alignment.pairs import fit_pairs
from moescope.alignment.result import AlignmentResult
from moescope.alignment.samples import Samples
from moescope.analyses.align_findings import findings
from moescope.analyses.align_panels import distributions, principal_components
from moescope.analyses.align_parts import Part, Parts
from moescope.analyses.material import Material
from moescope.analyses.registry import analysis
from moescope.captures.read import Capture, Recorded
from moescope.config import IntList
from moescope.errors import OptionError
from moescope.models.view import MoELayer, MoEModel
from moescope.progress import track
from moescope.runs import Finding, Result, library_versions

PARTS_VERSION = 1
"""Raised with every change of mathematics, so that no part computed before it is reused."""
TARGET_ROWS = 1_024
"""Inputs of a target expert in its own layer that the start of a fit is taken from."""
PANEL_ROWS = 5_000
"""Tokens behind histograms and principal components."""


@dataclass(frozen=True, kw_only=True)
class AlignOptions:
    """Options of `align`."""

    source: int
    """Layer whose experts are imitated; the model's own layer number."""
    target: int
    """Layer whose experts imitate them."""
    source_experts: IntList = ()
    """Experts of the source layer; all if left out."""
    target_experts: IntList = ()
    """Experts of the target layer; all if left out."""
    protocol: Literal["converged", "published"] = "converged"
    """`converged`, or `published`: ten Adam steps, as in MoE Align."""
    controls: bool = True
    """Fit the controls too; without them there is no score."""
    held_out_share: float = 0.2
    """Share of every domain's documents kept for the reported errors."""
    max_tokens: int = 5_000
    """Most tokens of a source expert, training and held out together."""
    budget_seconds: float | None = None
    """Most seconds for all fits of one source expert; None for no limit."""
    seed: int = 0
    """Seed of every random choice."""

    def __post_init__(self) -> None:
        if not 0 < self.held_out_share < 1:
            raise OptionError(
                "held_out_share is not a share", got=self.held_out_share, expected="0 to 1"
            )


def operations(model: MoEModel, options: AlignOptions) -> float:
    """Floating-point operations of all fits: steps forth and back, and Muon's matrix products."""
    source, target = (model.layer(n) for n in (options.source, options.target))
    sources = _experts(source, options.source_experts)
    targets = _experts(target, options.target_experts)
    solver, hidden = SolverOptions(), source.hidden_size
    each = len(targets)
    if options.controls:
        each += len(targets) * RANDOM_SEEDS + RANDOM_SEEDS + 1
    step = 6 * solver.batch_tokens * hidden * (hidden + 3 * target.intermediate_size)
    step += PRODUCTS * 2 * hidden**3
    return float(len(sources) * each * solver.steps * step)


@analysis(
    question="Can experts of one layer be imitated by experts of another, up to a change of input?",
    source="MoE Align; held-out error, controls, score and intervals ours",
    needs={"inputs", "routing", "weights"},
    options=AlignOptions,
    work=operations,
)
def align(material: Material, options: AlignOptions) -> Result:
    """Fit an adapter for every pair of experts, beside controls; resumes by source expert."""
    capture = material.capture
    source, target = (material.model.layer(n) for n in (options.source, options.target))
    source_experts = _experts(source, options.source_experts)
    held_out = held_out_documents(capture, options)
    target_experts = _experts(target, options.target_experts)
    parts = Parts.of(material.run, _key(capture, options, target_experts))
    job = _Job(
        capture=capture,
        source=source,
        target=target,
        samples=capture.expert_samples(source.index, source_experts),
        target_inputs=_target_inputs(capture, target, target_experts, held_out),
        held_out=held_out,
        options=options,
    )
    label = f"aligning layer {source.index}"
    for expert in track(source_experts, label, total=len(source_experts)):
        if not parts.done(expert):
            parts.save(Part.of(source.index, target.index, expert, job.fit(expert)))
    finished = [parts.load(expert) for expert in source_experts]
    table = pd.concat([part.table for part in finished], ignore_index=True)
    panels = job.panels()
    return Result(
        name="align",
        tables={
            "align": table,
            "curves": pd.concat([part.curves for part in finished], ignore_index=True),
            "distributions": distributions(panels),
            "pca": principal_components(panels, options.seed),
        },
        findings=[
            *findings(table, options.source, options.target),
            *_unmeasured_domains(capture, held_out),
        ],
        provenance={"seed": options.seed, "adapters": str(parts.folder.relative_to(material.run))},
    )


def held_out_documents(capture: Capture, options: AlignOptions) -> Bool[Tensor, " documents"]:
    """Choose documents for the reported errors, about the same share of every domain.

    A domain of at least two documents gives at least one and keeps at least one.
    """
    domain_of = capture.document_domains
    random = np.random.default_rng(options.seed)
    held_out = torch.zeros(len(domain_of), dtype=torch.bool)
    for domain in range(len(capture.domains)):
        documents = (domain_of == domain).nonzero()[:, 0].numpy()
        size = min(max(1, round(options.held_out_share * len(documents))), len(documents) - 1)
        held_out[torch.from_numpy(random.permutation(documents)[: max(0, size)])] = True
    return held_out


def _unmeasured_domains(capture: Capture, held_out: Bool[Tensor, " documents"]) -> list[Finding]:
    measured = set(capture.document_domains[held_out].tolist())
    missing = [name for n, name in enumerate(capture.domains) if n not in measured]
    if not missing:
        return []
    text = f"The errors say nothing about {', '.join(missing)}: one document cannot be held out."
    return [Finding(text=text)]


def _experts(layer: MoELayer, chosen: Sequence[int]) -> list[int]:
    for expert in chosen:
        if not 0 <= expert < layer.num_experts:
            raise OptionError(
                f"layer {layer.index} has no expert {expert}",
                expected=f"0 to {layer.num_experts - 1}",
            )
    return list(dict.fromkeys(chosen)) or list(range(layer.num_experts))


def _key(capture: Capture, options: AlignOptions, target_experts: Sequence[int]) -> object:
    """What a finished source expert depends on; which others are aligned is not part of it."""
    chosen = {"source_experts": None, "target_experts": list(target_experts)}
    return {
        "parts": PARTS_VERSION,
        "capture": capture.digest,
        "options": asdict(options) | chosen,
        "solver": asdict(SolverOptions()),
        "libraries": library_versions(),
    }


def _target_inputs(
    capture: Capture,
    target: MoELayer,
    experts: Sequence[int],
    held_out: Bool[Tensor, " documents"],
) -> dict[int, Float[Tensor, "tokens hidden"]]:
    """Inputs that the targets have in their own layer, from training documents only."""
    inputs = {}
    for expert, recorded in capture.expert_samples(target.index, experts).items():
        trained_on = ~held_out[capture.documents[recorded.tokens]]
        inputs[expert] = recorded.values[trained_on][:TARGET_ROWS].float()
    return inputs


@dataclass(frozen=True, kw_only=True, eq=False)
class _Job:
    """Everything that all source experts of one call share."""

    capture: Capture
    source: MoELayer
    target: MoELayer
    samples: Mapping[int, Recorded]
    """Recorded inputs of each source expert."""
    target_inputs: Mapping[int, Tensor]
    """Inputs [tokens, hidden] of each target expert in its own layer."""
    held_out: Tensor
    """[documents] for the reported errors."""
    options: AlignOptions

    def fit(self, expert: int) -> dict[int, AlignmentResult]:
        """One source expert against all targets."""
        samples = self._samples(expert, self.options.max_tokens)
        assert samples.documents is not None
        aside = self.held_out[samples.documents]
        names = {e: f"L{self.target.index}E{e}" for e in self.target_inputs}
        fits = fit_pairs(
            samples.where(~aside),
            samples.where(aside),
            {name: self.target.expert_weights(e) for e, name in names.items()},
            source=self.source.expert_weights(expert),
            source_name=f"L{self.source.index}E{expert}",
            target_inputs={names[e]: x for e, x in self.target_inputs.items() if len(x)},
            options=FitOptions(
                protocol=self.options.protocol,
                controls=self.options.controls,
                budget_seconds=self.options.budget_seconds,
                seed=self.options.seed,
            ),
        )
        return {e: fits[name] for e, name in names.items()}

    def panels(self) -> dict[str, Float[Tensor, "tokens hidden"]]:
        """Some inputs and outputs of the source experts, some inputs of the target layer."""
        each = math.ceil(PANEL_ROWS / len(self.samples))
        samples = [self._samples(expert, each) for expert in self.samples]
        targets = self.capture.inputs(self.target.index).values
        chosen = np.random.default_rng(self.options.seed).permutation(len(targets))[:PANEL_ROWS]
        return {
            f"input of layer {self.source.index}": torch.cat([s.inputs for s in samples]),
            f"expert outputs of layer {self.source.index}": torch.cat([s.outputs for s in samples]),
            f"input of layer {self.target.index}": targets[chosen].float(),
        }

    def _samples(self, expert: int, most: int) -> Samples:
        """What the expert does, in fp32, on at most so many of its inputs, chosen at random."""
        recorded = self.samples[expert]
        random = np.random.default_rng(self.options.seed)
        chosen = np.sort(random.permutation(len(recorded.tokens))[:most])
        inputs = recorded.values[chosen].float()
        weights = self.source.expert_weights(expert).to(dtype=torch.float32, device="cpu")
        documents = self.capture.documents[recorded.tokens[chosen]]
        return Samples(inputs, weights(inputs), documents)
