"""Can an expert of another layer stand in for this one, up to a change of input?"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool
from torch import Tensor

from moescope.alignment.options import FitOptions
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
from moescope.models.view import MoELayer
from moescope.progress import track
from moescope.runs import Result


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


@analysis(
    question="Can experts of one layer be imitated by experts of another, up to a change of input?",
    source="MoE Align; held-out error, controls, score and intervals ours",
    needs={"inputs", "routing", "weights"},
    options=AlignOptions,
)
def align(material: Material, options: AlignOptions) -> Result:
    """Fit an adapter for every pair of experts, beside controls; resumes by source expert."""
    capture = material.capture
    source, target = (material.model.layer(n) for n in (options.source, options.target))
    source_experts = _experts(source, options.source_experts)
    target_experts = _experts(target, options.target_experts)
    parts = Parts.of(material.run, _key(capture, options, target_experts))
    held_out = held_out_documents(capture, options)
    for expert in track(
        source_experts, f"aligning layer {source.index}", total=len(source_experts)
    ):
        if not parts.done(expert):
            fits = _fit_source(capture, source, target, expert, target_experts, held_out, options)
            parts.save(Part.of(source.index, target.index, expert, fits))
    finished = [parts.load(expert) for expert in source_experts]
    table = pd.concat([part.table for part in finished], ignore_index=True)
    inputs, outputs = _source_tensors(capture, source, source_experts)
    panels = {
        f"input of layer {source.index}": inputs,
        f"expert outputs of layer {source.index}": outputs,
        f"input of layer {target.index}": capture.inputs(target.index).values.float(),
    }
    return Result(
        name="align",
        tables={
            "align": table,
            "curves": pd.concat([part.curves for part in finished], ignore_index=True),
            "distributions": distributions(panels),
            "pca": principal_components(panels, options.seed),
        },
        findings=findings(table, options.source, options.target),
        provenance={"seed": options.seed, "adapters": str(parts.folder.relative_to(material.run))},
    )


def held_out_documents(capture: Capture, options: AlignOptions) -> Bool[Tensor, " documents"]:
    """Choose documents for the reported errors, the same share of every domain."""
    number = len(capture.document_names)
    domain_of = torch.full((number,), -1)
    domain_of[capture.documents] = capture.domain_of
    random = np.random.default_rng(options.seed)
    held_out = torch.zeros(number, dtype=torch.bool)
    for domain in range(len(capture.domains)):
        documents = (domain_of == domain).nonzero()[:, 0].numpy()
        size = round(options.held_out_share * len(documents))
        held_out[torch.from_numpy(random.permutation(documents)[:size])] = True
    return held_out


def _experts(layer: MoELayer, chosen: Sequence[int]) -> list[int]:
    for expert in chosen:
        if not 0 <= expert < layer.num_experts:
            raise OptionError(
                f"layer {layer.index} has no expert {expert}",
                expected=f"0 to {layer.num_experts - 1}",
            )
    return list(chosen) or list(range(layer.num_experts))


def _key(capture: Capture, options: AlignOptions, target_experts: Sequence[int]) -> object:
    """What a finished source expert depends on; which others are aligned is not part of it."""
    chosen = {"source_experts": None, "target_experts": list(target_experts)}
    return {"capture": capture.digest, "options": asdict(options) | chosen}


def _fit_source(
    capture: Capture,
    source: MoELayer,
    target: MoELayer,
    expert: int,
    target_experts: Sequence[int],
    held_out: Bool[Tensor, " documents"],
    options: AlignOptions,
) -> dict[int, AlignmentResult]:
    """All targets for one source expert."""
    recorded = capture.expert_inputs(source.index, expert)
    samples = _samples(capture, source, expert, _thinned(recorded, options))
    assert samples.documents is not None
    aside = held_out[samples.documents]
    targets = {f"L{target.index}E{e}": target.expert_weights(e) for e in target_experts}
    inputs = {
        f"L{target.index}E{e}": capture.expert_inputs(target.index, e).values.float()
        for e in target_experts
    }
    fits = fit_pairs(
        samples.where(~aside),
        samples.where(aside),
        targets,
        source=source.expert_weights(expert),
        source_name=f"L{source.index}E{expert}",
        target_inputs={name: x for name, x in inputs.items() if len(x)},
        options=FitOptions(
            protocol=options.protocol,
            controls=options.controls,
            budget_seconds=options.budget_seconds,
            seed=options.seed,
        ),
    )
    return dict(zip(target_experts, fits.values(), strict=True))


def _thinned(recorded: Recorded, options: AlignOptions) -> Recorded:
    """A random part of the tokens where there are more than asked for."""
    random = np.random.default_rng(options.seed)
    chosen = np.sort(random.permutation(len(recorded.tokens))[: options.max_tokens])
    return Recorded(recorded.tokens[chosen], recorded.values[chosen])


def _samples(capture: Capture, layer: MoELayer, expert: int, recorded: Recorded) -> Samples:
    """What the expert does, in fp32, on recorded inputs."""
    inputs = recorded.values.float()
    outputs = layer.expert_weights(expert).to(dtype=torch.float32, device="cpu")(inputs)
    return Samples(inputs, outputs, capture.documents[recorded.tokens])


def _source_tensors(
    capture: Capture, layer: MoELayer, experts: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Inputs and outputs of several experts of a layer, one after the other."""
    samples = [_samples(capture, layer, e, capture.expert_inputs(layer.index, e)) for e in experts]
    return torch.cat([s.inputs for s in samples]), torch.cat([s.outputs for s in samples])
