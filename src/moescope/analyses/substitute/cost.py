"""About how much it will take, before anything is captured."""

from moescope.analyses.align.cost import operations as fit_operations
from moescope.analyses.align.options import AlignOptions
from moescope.analyses.substitute.options import AdapterForm, SubstituteOptions
from moescope.analyses.substitute.removal import tried_counts
from moescope.analyses.substitute.sources import decoder_layers
from moescope.analyses.work import parameters_met
from moescope.corpora.packing import Packing
from moescope.models.view import MoEModel

_CONTEXT = 1.5
"""Tokens read for each held-out token, since rows hold several documents."""
_STEP = Packing().rows * Packing().length
"""Tokens of a step of training."""


def operations(model: MoEModel, options: SubstituteOptions) -> float:
    """Floating-point operations of fits, passes over the held-out text, and training of adapters.

    Fits that stop early, and those that the run holds already, make it less.
    """
    layers = decoder_layers(model, options.source_layers)
    targets = decoder_layers(model, options.target_layers)
    if len({layer.index for layer in (*layers, *targets)}) < 2:
        return 0.0  # it will refuse
    sources = options.sources
    if options.source_experts:
        sources = len(layers) * len(options.source_experts)
    others = sum(layer.num_experts for layer in targets)
    near = layers[0].num_experts - 1
    number = min(options.candidates, others)
    each = others + number * options.random + min(number, near)
    fits = sum(_of_fit(model, form, options) for form in options.forms)
    with_adapters = len(options.forms) * (3 + options.random)
    passes = sources * (3 + with_adapters)
    passes += len(tried_counts(sources)) * (2 + len(options.forms) * (2 + options.random))
    read = passes * 2 * _CONTEXT * options.held_out_share * options.tokens
    trained = sources * (1 + with_adapters) * options.tune_steps * 6 * _STEP
    return sources * each * fits + (read + trained) * parameters_met(model)


def _of_fit(model: MoEModel, form: AdapterForm, options: SubstituteOptions) -> float:
    """One fit, as `align` counts it for all experts of a layer."""
    source, target = decoder_layers(model, ())[:2]
    of_layer = AlignOptions(
        source=(source.index,),
        target=(target.index,),
        source_experts=(0,),
        form=form,
        rank=options.rank,
        controls=False,
        held_out_share=options.held_out_share,
        max_tokens=options.max_tokens,
    )
    return fit_operations(model, of_layer) / target.num_experts
