"""Which experts are taken out, and which may stand in for them."""

from collections.abc import Sequence

import numpy as np

from moescope.alignment.checks import refusal
from moescope.analyses.fits import Fits, Source, Target
from moescope.analyses.substitute.options import SubstituteOptions
from moescope.errors import CaptureError, ModelError
from moescope.models.view import MoELayer, MoEModel


def decoder_layers(model: MoEModel, chosen: Sequence[int]) -> list[MoELayer]:
    """The chosen sparse layers of the decoder, or all.

    Raises:
        OptionError: One of them is dense or does not exist.
    """
    if chosen:
        return [model.layer(index) for index in dict.fromkeys(chosen)]
    return [layer for layer in model.layers if layer.stack == "decoder"]


def sources_of(fits: Fits, options: SubstituteOptions) -> tuple[list[Source], dict[Source, str]]:
    """The experts to take out, in the order of the layers, and those that cannot be, with why.

    Drawn in turn from every layer, in random order, and among those that can be fitted.

    Raises:
        CaptureError: None of them has enough tokens.
        ModelError: Nothing can stand in for one of them.
        OptionError: There is no such layer or expert.
    """
    found, refused = list[Source](), dict[Source, str]()
    for source in _in_turn(decoder_layers(fits.material.model, options.source_layers), options):
        status = refusal(*fits.samples(source))
        if status is not None:
            refused[source] = status
        else:
            found.append(source)
        if len(found) == options.sources and not options.source_experts:
            break
    if not found:
        raise CaptureError(
            "none of the experts that were to be taken out has enough tokens to fit adapters with",
            got=", ".join(f"{source}: {status}" for source, status in refused.items()),
            remedy="Capture more text, or with more tokens_per_expert",
        )
    for source in found:  # before the first of them is fitted
        targets_of(fits.material.model, source, options)
    return sorted(found), refused


def _in_turn(layers: Sequence[MoELayer], options: SubstituteOptions) -> list[Source]:
    if options.source_experts:
        for layer in layers:
            layer.check_experts(options.source_experts)
        return [Source(la.index, e) for la in layers for e in dict.fromkeys(options.source_experts)]
    drawn = []
    for layer in layers:
        order = np.random.default_rng([options.seed, layer.index]).permutation(layer.num_experts)
        drawn += [(turn, Source(layer.index, int(e))) for turn, e in enumerate(order)]
    return [source for _, source in sorted(drawn, key=lambda item: item[0])]


def targets_of(model: MoEModel, source: Source, options: SubstituteOptions) -> list[Target]:
    """Experts of other layers that may stand in.

    Raises:
        ModelError: There is no other layer.
    """
    layers = decoder_layers(model, options.target_layers)
    found = [
        Target(layer.index, expert)
        for layer in layers
        if layer.index != source.layer
        for expert in range(layer.num_experts)
    ]
    if not found:
        raise ModelError(
            f"no expert of another layer can stand in for {source}",
            got=f"target layers {', '.join(str(layer.index) for layer in layers)}",
            remedy="Name other target layers, if the model has several with experts",
        )
    return found


def neighbours(model: MoEModel, source: Source) -> list[Target]:
    """The other experts of its own layer."""
    experts = range(model.layer(source.layer).num_experts)
    return [Target(source.layer, expert) for expert in experts if expert != source.expert]


def drawn(targets: Sequence[Target], number: int, source: Source, seed: int) -> list[Target]:
    """So many of them, at random."""
    random = np.random.default_rng([seed, *source, len(targets)])
    return [targets[i] for i in sorted(random.permutation(len(targets))[:number])]
