"""What single neurons of experts do, and what is lost without them (A Closer Look into MoE)."""

from collections.abc import Sequence
from typing import Any

import pandas as pd

from moescope.analyses.contexts import reader_of
from moescope.analyses.curves import Curve
from moescope.analyses.material import Material
from moescope.analyses.neurons.ablation import ablation_table, planned, sweep
from moescope.analyses.neurons.findings import findings
from moescope.analyses.neurons.layer import LayerFound, measure_layer
from moescope.analyses.neurons.options import NeuronsOptions
from moescope.analyses.neurons.reading import Units
from moescope.analyses.neurons.selective import shown
from moescope.analyses.neurons.tokens import with_text
from moescope.analyses.registry import analysis
from moescope.captures.read import Capture
from moescope.evaluate.predictions import evaluating
from moescope.evaluate.totals import Resampling
from moescope.measures.multiple_tests import holm
from moescope.models.view import MoEModel
from moescope.progress import track
from moescope.runs import Finding, Result

_ALWAYS = ("neurons", "experts", "agreement")
"""Tables that are there even where they are empty."""


def operations(model: MoEModel, options: NeuronsOptions) -> float:
    """Floating-point operations of the ablations: nine changed models for four domains."""
    total = sum(parameter.numel() for parameter in model.model.parameters())
    return 2.0 * total * options.tokens * (1 + 9 * 4)


@analysis(
    question="How active are single neurons, are they made for a kind of text, and do they matter?",
    source="A Closer Look into MoE (intermediate states); nulls, intervals, ablations ours",
    needs={"routing", "inputs", "live model"},
    options=NeuronsOptions,
    work=operations,
    curves=(
        Curve(
            measure="share of active neurons",
            table="neurons",
            value="active",
            limits=("active_low", "active_high"),
        ),
        Curve(
            measure="share selective for a domain",
            table="neurons",
            value="selective_share",
        ),
    ),
)
def neurons(material: Material, options: NeuronsOptions) -> Result:
    """Active and dead neurons, selectivity for domains, numbering, and ablations."""
    model, every = material.model, list[LayerFound]()
    ablates = options.tokens > 0 and not model.model.config.is_encoder_decoder
    if ablates:
        material.text(options.tokens)  # refused before the long part, not after it
    with evaluating(model):
        for stack, index in track(material.capture.places, "neurons: layers"):
            capture = Capture(material.run, stack=stack)
            units = Units.of_capture(capture)
            every.append(measure_layer(capture, model.layer(index, stack), units, options))
    places = [row for found in every for row in found.places]
    tables = {
        "neurons": _corrected([found.layer for found in every]),
        "experts": pd.DataFrame([row for found in every for row in found.experts]),
        "agreement": pd.DataFrame([row for found in every for row in found.agreement]),
        "selective": _listed(every, options.show),
        "tokens": with_text(material.capture, places, reader_of(material)),
    }
    said = []
    if ablates:
        tables["ablation"] = _ablations(material, every, options)
    elif options.tokens:
        said.append(Finding(text="No ablations: an encoder-decoder does not go on with a text."))
    tables = {name: frame for name, frame in tables.items() if name in _ALWAYS or len(frame)}
    return Result(
        name="neurons",
        tables=tables,
        findings=[*findings(tables, options), *said],
        provenance={"seed": options.seed},
    )


def _corrected(rows: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """One row per layer, with p-values corrected for their number."""
    table = pd.DataFrame(rows)
    if "p_value" in table:
        table["p_corrected"] = holm(table["p_value"].to_numpy(float))
    return table


def _listed(every: Sequence[LayerFound], number: int) -> pd.DataFrame:
    """The neurons that are shown one by one."""
    frames = [shown(found.candidates, number) for found in every if len(found.candidates)]
    if not frames:
        return pd.DataFrame()
    table = pd.concat(frames, ignore_index=True)
    first = ["stack", "layer"]
    return table[first + [column for column in table if column not in first]]


def _ablations(
    material: Material,
    every: Sequence[LayerFound],
    options: NeuronsOptions,
) -> pd.DataFrame:
    """What is lost, on other documents than those that neurons were chosen on."""
    decoder = [found for found in every if found.layer["stack"] == "decoder"]
    chosen = pd.concat([found.chosen for found in decoder], ignore_index=True)
    if chosen.empty:
        return chosen
    norms = {
        (found.layer["layer"], expert): values
        for found in decoder
        for expert, values in found.norms.items()
    }
    shares = {found.layer["layer"]: found.reach for found in decoder}
    reach = {
        domain: {(layer, e): float(shares[layer][number, e]) for layer, e in norms}
        for number, domain in enumerate(material.capture.domains)
    }
    plan = planned(chosen, norms, reach, options)
    if not plan:
        return pd.DataFrame()
    totals = sweep(material.model, material.text(options.tokens), plan)
    units = Units.of_capture(material.capture)
    read = ~units.chosen_on()[units.of]
    return ablation_table(
        totals, plan, read, Resampling(resamples=options.bootstrap, seed=options.seed)
    )
