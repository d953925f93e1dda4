"""Which experts of any layer could do the work of which, with a change of input?"""

import pandas as pd

from moescope.analyses.atlas.chance import COLUMNS as RANDOM_COLUMNS
from moescope.analyses.atlas.cost import counts, shapes_of
from moescope.analyses.atlas.findings import findings
from moescope.analyses.atlas.options import AtlasOptions, sampled_experts
from moescope.analyses.atlas.plan import atlas_plan
from moescope.analyses.atlas.recall import recall
from moescope.analyses.atlas.sources import Sources
from moescope.analyses.atlas.tables import by_layers, with_p_values
from moescope.analyses.fits import Fits, Source
from moescope.analyses.material import Material
from moescope.analyses.registry import analysis
from moescope.models.view import MoEModel
from moescope.progress import track
from moescope.runs import Result

_COST_COLUMNS = ["fits_of", "fits", "operations", "seconds"]


def operations(model: MoEModel, options: AtlasOptions) -> float:
    """Floating-point operations of all fits at most."""
    return counts(shapes_of(model, options), options).operations


@analysis(
    question="Between which layers can an expert do the work of another, up to a change of input?",
    source="MoE Align, future work: all pairs of layers; screening, controls and correction ours",
    needs={"inputs", "routing", "weights"},
    options=AtlasOptions,
    work=operations,
    plan=atlas_plan,
)
def atlas(material: Material, options: AtlasOptions) -> Result:
    """Screen every ordered pair of decoder layers, and fit what screening keeps beside controls.

    Resumes by imitated expert.
    """
    experts = sampled_experts(material.model, options)
    fits = Fits.of(
        material,
        options.converged_fit(),
        held_out_share=options.held_out_share,
        max_tokens=options.max_tokens,
    )
    work = Sources(fits=fits, experts=experts, options=options)
    sources = [Source(layer, expert) for layer, chosen in experts.items() for expert in chosen]
    found = [work.pairs(s) for s in track(sources, "imitating experts", total=len(sources))]
    random = pd.DataFrame([row for one in found for row in one.random], columns=RANDOM_COLUMNS)
    pairs = with_p_values(pd.concat([one.table for one in found], ignore_index=True), random)
    costs = pd.DataFrame([row for one in found for row in one.costs], columns=_COST_COLUMNS)
    tables = {
        "atlas": pairs,
        "layers": by_layers(pairs),
        "random": random,
        "recall": recall(pairs),
        "cost": costs.groupby("fits_of").sum().reset_index(),
    }
    return Result(
        name="atlas",
        tables=tables,
        findings=findings(tables),
        provenance={"seed": options.seed, "experts": {str(k): v for k, v in experts.items()}},
    )
