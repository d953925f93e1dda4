"""Outputs of all experts for the same token: how alike, how long, and which the router prefers."""

from dataclasses import dataclass

import pandas as pd

from moescope.analyses.curves import Curve
from moescope.analyses.material import Material
from moescope.analyses.outputs.findings import findings
from moescope.analyses.outputs.one_pass import Recorded, measured
from moescope.analyses.outputs.tables import layer_tables
from moescope.analyses.registry import analysis
from moescope.captures.read import Capture
from moescope.errors import ModelError
from moescope.evaluate.predictions import evaluating
from moescope.evaluate.totals import Resampling
from moescope.models.view import MoELayer
from moescope.progress import track
from moescope.runs import Result


@dataclass(frozen=True, kw_only=True)
class OutputsOptions:
    """Options of `outputs`."""

    bootstrap: int = 1_000
    """Resamples of documents behind each 95% interval."""
    seed: int = 0
    """Seed of the resamples, and of the order of ranks that tie."""


@analysis(
    question="How alike are the outputs of all experts, and does the router prefer long ones?",
    source="A Closer Look into MoE (outputs, norms); centring, controls and intervals ours",
    needs={"inputs", "live model"},
    options=OutputsOptions,
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
    with evaluating(model):
        found = [
            tables_of(Capture(material.run, stack=layer.stack), layer, options)
            for layer in track(layers, "outputs: layers")
        ]
    tables = {
        name: pd.concat([layer[name] for layer in found], ignore_index=True) for name in found[0]
    }
    return Result(
        name="outputs",
        tables=tables,
        findings=findings(tables, weighs_inputs=any(layer.weighs_inputs for layer in layers)),
        provenance={"seed": options.seed},
    )


def tables_of(
    capture: Capture, layer: MoELayer, options: OutputsOptions
) -> dict[str, pd.DataFrame]:
    """The tables of one layer.

    Raises:
        CaptureError: Inputs were not recorded, or no whole rows.
    """
    recorded = Recorded.of(capture, layer.index)
    resampling = Resampling(resamples=options.bootstrap, seed=options.seed)
    return layer_tables(layer, recorded, measured(capture, layer, recorded), resampling)
