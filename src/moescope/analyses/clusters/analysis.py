"""Do experts of different layers fall into groups of one function, and can a group share one?"""

from moescope.analyses.clusters.findings import findings
from moescope.analyses.clusters.options import ClustersOptions
from moescope.analyses.clusters.sharing import DEPTH, sizes, smaller_models
from moescope.analyses.clusters.stability import stability_table
from moescope.analyses.clusters.tables import cut_table, member_table, pair_table, shared_table
from moescope.analyses.fits import Fits
from moescope.analyses.likeness import Likeness
from moescope.analyses.likeness_options import chosen_experts, fitting_operations
from moescope.analyses.loss_tables import against_table
from moescope.analyses.losses import Losses
from moescope.analyses.material import Material
from moescope.analyses.registry import analysis
from moescope.analyses.work import parameters_met
from moescope.evaluate.predictions import require_decoder_only
from moescope.evaluate.totals import Resampling
from moescope.models.view import MoEModel
from moescope.runs import Result


def operations(model: MoEModel, options: ClustersOptions) -> float:
    """Floating-point operations of the fits, where none is there yet, and of the losses."""
    experts = len(chosen_experts(model, options))
    few = min(options.stability_experts, experts)
    fits = fitting_operations(model, options, experts)
    fits += (3 + options.random) * fitting_operations(model, options, few)
    passes = 1 + len(sizes(experts, options)) * (5 + options.random)
    text = options.held_out_share * options.tokens
    return fits + 2.0 * parameters_met(model) * text * passes


@analysis(
    question="Do experts of all layers fall into clusters, of which each needs one expert?",
    source="MoE Align (future work); merging within layers after HC-SMoE; nulls and intervals ours",
    needs={"routing", "inputs", "live model"},
    options=ClustersOptions,
    work=operations,
)
def clusters(material: Material, options: ClustersOptions) -> Result:
    """Clusters of experts by how well they imitate one another, and models that share experts."""
    require_decoder_only(material.model)
    return clustered(options.fits(material), options)


def clustered(fits: Fits, options: ClustersOptions) -> Result:
    """The same for any adapters.

    Raises:
        OptionError: Fewer than four experts take part.
        CaptureError: Fewer than four have enough tokens; the capture lacks inputs.
        CorpusError: The text cannot be read, or no held-out document lies in it.
    """
    losses = Losses.held_out(fits, options.tokens, "clusters", options.behind_losses)
    likeness = Likeness.of(fits, chosen_experts(fits.material.model, options))
    cuts = cut_table(likeness, options)
    best = int(cuts.loc[cuts["best"], "clusters"].iloc[0])
    models = smaller_models(fits, likeness, options)
    sums = losses.of_all({s: smaller.change for s, smaller in models.items()}, "clusters: models")
    depth = [setting for setting in sums if setting.variant == DEPTH]
    resampling = Resampling(resamples=options.bootstrap, seed=options.seed)
    tables = {
        "clusters": cuts,
        "members": member_table(fits, likeness, best),
        "pairs": pair_table(likeness),
        "stability": stability_table(fits, likeness, options),
        "shared": shared_table(fits, likeness, models, sums, resampling),
        "against": against_table(sums, depth, "kept", resampling),
    }
    return Result(
        name="clusters",
        tables=tables,
        findings=findings(tables, likeness.left_out),
        provenance={"seed": options.seed},
    )
