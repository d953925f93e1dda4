"""Experts taken out, and experts of other layers in their place behind adapters (MoE Align)."""

from moescope.analyses.fits import Fits
from moescope.analyses.losses import Losses
from moescope.analyses.material import Material
from moescope.analyses.registry import analysis
from moescope.analyses.substitute.comparisons import against_table
from moescope.analyses.substitute.cost import operations
from moescope.analyses.substitute.curve import curve_table, reach_table
from moescope.analyses.substitute.findings import findings
from moescope.analyses.substitute.options import SubstituteOptions
from moescope.analyses.substitute.removal import sizes_of
from moescope.analyses.substitute.sources import sources_of
from moescope.analyses.substitute.stand_ins import choices_of
from moescope.analyses.substitute.tables import Measured, loss_table
from moescope.analyses.substitute.tuning import Tuning
from moescope.evaluate.predictions import require_decoder_only
from moescope.evaluate.totals import Resampling
from moescope.progress import track
from moescope.runs import Result


@analysis(
    question="Can an expert of another layer do the work of one that is taken out?",
    source="MoE Align (expert swap with adapter); held-out losses, controls and curves ours",
    needs={"inputs", "routing", "weights", "live model"},
    options=SubstituteOptions,
    work=operations,
)
def substitute(material: Material, options: SubstituteOptions) -> Result:
    """Loss with experts of other layers behind adapters, against ablation and random experts.

    Raises:
        CaptureError: The capture lacks inputs, or tokens of the experts to take out.
        ModelError: The model is an encoder-decoder, or has one layer with experts.
        OptionError: There is no such layer or expert.
    """
    require_decoder_only(material.model)
    fits = {
        form: Fits.of(
            material,
            options.fit_options(form),
            held_out_share=options.held_out_share,
            max_tokens=options.max_tokens,
        )
        for form in options.forms
    }
    first = next(iter(fits.values()))
    sources, refused = sources_of(first, options)
    choices = {
        source: choices_of(fits, source, options)
        for source in track(sources, "substitute: adapters", total=len(sources))
    }
    losses = Losses.held_out(first, options.tokens, "substitute", options.behind_losses)
    chosen = {
        source: {kind: stand_ins[0] for kind, stand_ins in each.items()}
        for source, each in choices.items()
    }
    if options.tune_steps:
        tuning = Tuning(first, options, losses.folder)
        for each in chosen.values():
            further = [tuning.tuned(stand_in) for stand_in in each.values()]
            each |= {stand_in.kind: stand_in for stand_in in further}
    resampling = Resampling(resamples=options.bootstrap, seed=options.seed)
    measured = Measured(chosen, losses)
    sizes, most = sizes_of(first, sources), max(options.thresholds)
    curve = curve_table(material.model, choices, sizes, losses, most, resampling)
    tables = {
        "substitute": loss_table(measured, resampling),
        "against": against_table(measured, resampling),
        "curve": curve,
        "reach": reach_table(curve, options.thresholds),
    }
    return Result(
        name="substitute",
        tables=tables,
        findings=findings(tables, refused, len(sources)),
        provenance={"seed": options.seed, "refused": {str(s): why for s, why in refused.items()}},
    )
