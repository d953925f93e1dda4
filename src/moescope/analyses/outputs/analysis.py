"""Outputs of all experts for the same token: how alike, how long, and which the router prefers."""

import numpy as np
import pandas as pd

from moescope.analyses.curves import Curve
from moescope.analyses.material import Material
from moescope.analyses.outputs.by_weights import (
    Association,
    associations,
    by_layer,
    together,
    weight_columns,
    weights_alike,
)
from moescope.analyses.outputs.findings import findings
from moescope.analyses.outputs.one_pass import Recorded, measured
from moescope.analyses.outputs.options import OutputsOptions, operations
from moescope.analyses.outputs.tables import layer_tables
from moescope.analyses.registry import analysis
from moescope.captures.read import Capture
from moescope.errors import ModelError
from moescope.evaluate.predictions import evaluating
from moescope.evaluate.totals import Resampling
from moescope.models.on_disk import StoredLayers, in_memory
from moescope.models.view import MoELayer
from moescope.progress import track
from moescope.runs import Result


@analysis(
    question="How alike are the outputs of all experts, and does the router prefer long ones?",
    source="A Closer Look into MoE (outputs, norms); centring, controls and intervals ours",
    needs={"inputs", "live model"},
    options=OutputsOptions,
    work=operations,
    curves=(
        Curve(
            measure="angular similarity of outputs",
            table="outputs",
            value="value",
            limits=("value_low", "value_high"),
            where={"measure": "angular", "pairs": "all", "tokens": "all"},
        ),
        Curve(
            measure="rank correlation, norm with score",
            table="norms",
            value="value",
            limits=("value_low", "value_high"),
            where={"measure": "spearman", "tokens": "all"},
        ),
        Curve(
            measure="rank correlation, matched weights with outputs",
            table="weights",
            value="value",
            limits=("value_low", "value_high"),
            where={"weights": "matched", "outputs": "cosine"},
        ),
    ),
)
def outputs(material: Material, options: OutputsOptions) -> Result:
    """Every expert on every recorded token of whole rows, layer by layer."""
    model = material.model
    layers = [model.layer(index, stack) for stack, index in material.capture.places]
    if all(layer.num_experts < 2 for layer in layers):
        raise ModelError(
            f"the layers of the model {model.name!r} have one expert each",
            expected="two or more, to compare their outputs",
        )
    stored = in_memory(model)
    found, every = [], list[Association]()
    with evaluating(model):
        for layer in track(layers, "outputs: layers"):
            capture = Capture(material.run, stack=layer.stack)
            tables, associated = of_layer(capture, layer, stored, options)
            found.append(tables)
            every += associated
    tables = {
        name: pd.concat([layer[name] for layer in found], ignore_index=True) for name in found[0]
    }
    if every:
        tables["weights"] = by_layer(every)
    if any(np.isfinite(one.found.rho) for one in every):
        tables["weights_together"] = together(every)
    return Result(
        name="outputs",
        tables=tables,
        findings=findings(tables, weighs_inputs=any(layer.weighs_inputs for layer in layers)),
        provenance={"seed": options.seed},
    )


def of_layer(
    capture: Capture, layer: MoELayer, stored: StoredLayers, options: OutputsOptions
) -> tuple[dict[str, pd.DataFrame], list[Association]]:
    """The tables of one layer, and whether its experts' weights say how alike outputs are.

    Raises:
        CaptureError: Inputs were not recorded, or no whole rows.
    """
    recorded = Recorded.of(capture, layer.index, options.tokens)
    resampling = Resampling(resamples=options.bootstrap, seed=options.seed)
    found = measured(capture, layer, recorded)
    tables = layer_tables(layer, recorded, found, resampling)
    alike = weights_alike(stored, layer, options)
    tables["pairs"] = tables["pairs"].assign(**weight_columns(tables["pairs"], alike))
    return tables, associations(layer, alike, recorded, found, options)
