"""What does a model lose if a token goes to the most similar expert that happens to be at hand?"""

from moescope.analyses.fits import Fits
from moescope.analyses.likeness import Likeness, tokens_by_expert
from moescope.analyses.likeness_options import chosen_experts, fitting_operations
from moescope.analyses.loss_tables import against_table
from moescope.analyses.losses import Losses
from moescope.analyses.material import Material
from moescope.analyses.registry import analysis
from moescope.analyses.reroute.findings import findings
from moescope.analyses.reroute.options import RerouteOptions
from moescope.analyses.reroute.tables import reroute_table, route_table
from moescope.analyses.reroute.ways import ANY_LAYER, ways
from moescope.analyses.work import parameters_met
from moescope.evaluate.predictions import require_decoder_only
from moescope.evaluate.totals import Resampling
from moescope.models.view import MoEModel
from moescope.runs import Result


def operations(model: MoEModel, options: RerouteOptions) -> float:
    """Floating-point operations of the fits, where none is there yet, and of the losses."""
    fits = fitting_operations(model, options, len(chosen_experts(model, options)))
    passes = 1 + len(options.budgets) * (5 + len(options.thresholds) + options.random)
    text = options.held_out_share * options.tokens
    return fits + 2.0 * parameters_met(model) * text * passes


@analysis(
    question="What is lost if tokens of experts that are not at hand go to the most similar one?",
    source="MoE Align (future work); other ways to go on, controls and intervals ours",
    needs={"routing", "inputs", "live model"},
    options=RerouteOptions,
    work=operations,
)
def reroute(material: Material, options: RerouteOptions) -> Result:
    """Loss with few resident experts: rerouted by likeness, skipped, or by other ways."""
    require_decoder_only(material.model)
    return rerouted(options.fits(material), options)


def rerouted(fits: Fits, options: RerouteOptions) -> Result:
    """The same for any adapters.

    Raises:
        OptionError: Fewer than four experts take part.
        CaptureError: Fewer than four have enough tokens; the capture lacks inputs.
        CorpusError: The text cannot be read, or no held-out document lies in it.
    """
    losses = Losses.held_out(fits, options.tokens, "reroute", options.behind_losses)
    likeness = Likeness.of(fits, chosen_experts(fits.material.model, options))
    learned = tokens_by_expert(fits.tokens, likeness.experts, held_out=False)
    tried = ways(fits, likeness, learned, options)
    sums = losses.of_all({s: way.change for s, way in tried.items()}, "reroute: ways")
    resampling = Resampling(resamples=options.bootstrap, seed=options.seed)
    used = tokens_by_expert(fits.tokens, likeness.experts, held_out=True)
    threshold = options.thresholds[0]
    own = [s for s in sums if (s.way, s.threshold) == (ANY_LAYER, threshold)]
    tables = {
        "reroute": reroute_table(fits, tried, sums, used, resampling),
        "against": against_table(sums, own, "resident", resampling),
        "routes": route_table(likeness, tried, threshold),
    }
    return Result(
        name="reroute",
        tables=tables,
        findings=findings(tables, threshold, likeness.left_out),
        provenance={"seed": options.seed},
    )
