"""Which experts carry a prediction: direct contribution to its logit, and ablation (MoE Lens)."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from moescope.analyses.attribute.ablation import Ablations
from moescope.analyses.attribute.direct import Contributions, contributions
from moescope.analyses.attribute.findings import findings
from moescope.analyses.attribute.options import AttributeOptions
from moescope.analyses.attribute.passes import PromptBatch, batches_of
from moescope.analyses.attribute.prompts import Prompt, places_of, prompts_of
from moescope.analyses.attribute.tables import (
    Gathered,
    agreements,
    mean_columns,
    parts_table,
    predictions,
)
from moescope.analyses.material import Material
from moescope.analyses.registry import analysis, of_capture
from moescope.analyses.work import parameters_met
from moescope.corpora.files import files_sha256
from moescope.errors import CaptureError, ModelError
from moescope.evaluate.predictions import evaluating
from moescope.evaluate.totals import Resampling
from moescope.measures.attribution import orders
from moescope.models.view import MoEModel
from moescope.runs import Finding, Result


def _operations(model: MoEModel, options: AttributeOptions) -> float:
    """Floating-point operations where the prompts are places of the captured text."""
    passes = 3 + sum(layer.num_experts for layer in model.layers)
    return 2.0 * parameters_met(model) * passes * options.prompts * options.context


def of_facts(material: Material, options: AttributeOptions) -> dict[str, Any]:
    """What a result rests on: the capture, and the content of the file of facts."""
    if options.facts is None:
        return of_capture(material, options)
    path = Path(options.facts)
    return of_capture(material, options) | {"facts_sha256": files_sha256([(path.name, path)])}


@analysis(
    question="Which experts carry this prediction?",
    source="MoE Lens (localisation); completeness, shuffled answers and intervals ours",
    needs={"live model"},
    options=AttributeOptions,
    work=_operations,
    basis=of_facts,
)
def attribute(material: Material, options: AttributeOptions) -> Result:
    """Direct contribution to the logit of an answer, and loss of it under ablation, by expert."""
    prompts = prompts_of(material, options)
    controls, missing = _controls(material, options)
    result = localised(material.model, prompts, options, controls)
    return replace(result, findings=[*result.findings, *missing])


def _controls(material: Material, options: AttributeOptions) -> tuple[list[Prompt], list[Finding]]:
    """Places of the captured text, or why there are none."""
    if not options.controls or (options.prompt is None and options.facts is None):
        return [], []
    try:
        return places_of(material, options.controls, options), []
    except (CaptureError, ModelError) as error:
        return [], [Finding(text=f"Nothing to compare with: {error}")]


def localised(
    model: MoEModel,
    prompts: Sequence[Prompt],
    options: AttributeOptions,
    controls: Sequence[Prompt] = (),
) -> Result:
    """The same for any model and prompts.

    Args:
        model: The model.
        prompts: What it reads, and what it should go on with.
        options: The options; what they say about prompts is not asked.
        controls: Other prompts, on which experts are ablated for comparison.

    Raises:
        ModelError: The model predicts no tokens.
    """
    resampling = Resampling(resamples=options.bootstrap, seed=options.seed)
    with evaluating(model):
        batches = batches_of(model, prompts)
        frame = predictions(model, batches, prompts)
        answers, columns = np.unique(frame["answer_id"], return_inverse=True)
        direct, refusal = _direct(model, batches, torch.from_numpy(answers))
        shuffled = columns[orders(len(prompts), options.shuffles, options.seed)]
        gathered = Gathered(columns, shuffled, resampling)
        used = _gather(Ablations(model, batches, torch.from_numpy(answers)), direct, gathered)
        beside = _control_losses(model, controls, resampling) if controls else pd.DataFrame()
    tables = {"attribute": gathered.table().join(beside)}
    if direct is not None:
        tables["parts"] = parts_table(direct, columns, resampling)
        frame = frame.join(agreements(gathered, used))
    tables["prompts"] = frame
    return Result(
        name="attribute",
        tables=tables,
        findings=[*findings(tables, resampling), *refusal],
        provenance={"seed": options.seed, "prompts": len(prompts), "controls": len(controls)},
    )


def _direct(
    model: MoEModel, batches: Sequence[PromptBatch], answers: Int64[Tensor, " answers"]
) -> tuple[Contributions | None, list[Finding]]:
    """Contributions, or why there are none: ablation says something all the same."""
    try:
        return contributions(model, batches, answers), []
    except ModelError as error:
        return None, [Finding(text=f"No direct contributions: {error}")]


def _gather(
    ablations: Ablations, direct: Contributions | None, gathered: Gathered
) -> Bool[np.ndarray, "experts prompts"]:
    """Put every expert into `gathered`; returns which prompts use it."""
    every = []
    for expert, rises in ablations.rises():
        used = ablations.used[expert[0]][:, expert[1]]
        every.append(used)
        measures = {} if direct is None else {"contribution": direct.of(expert).double().numpy()}
        gathered.add(expert, measures | {"ablation_loss": rises}, int(used.sum()))
    return np.array(every)


def _control_losses(
    model: MoEModel, controls: Sequence[Prompt], resampling: Resampling
) -> pd.DataFrame:
    """Rise of the loss at the controls, expert by expert."""
    batches = batches_of(model, controls)
    found = predictions(model, batches, controls)["answer_id"]
    answers, columns = np.unique(found, return_inverse=True)
    prompts = np.arange(len(controls))
    rows = [
        mean_columns("control_loss", rises[prompts, columns], resampling)
        for _, rises in Ablations(model, batches, torch.from_numpy(answers)).rises()
    ]
    return pd.DataFrame(rows).assign(n_controls=len(controls))
