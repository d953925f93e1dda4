"""Whether adapters that were trained on one domain hold on others (MoE Align, future work)."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from moescope.analyses.align.options import experts_of
from moescope.analyses.fits import Source
from moescope.analyses.material import Material
from moescope.analyses.ood.findings import findings
from moescope.analyses.ood.fits import Targets, Trained
from moescope.analyses.ood.losses import substituted
from moescope.analyses.ood.options import OodOptions
from moescope.analyses.ood.split import HALVES, Sample, Work, halves, usable
from moescope.analyses.ood.tables import errors_of, tables
from moescope.analyses.registry import analysis
from moescope.analyses.work import parameters_met
from moescope.errors import CaptureError, OptionError, unknown
from moescope.evaluate.predictions import require_decoder_only
from moescope.evaluate.totals import Resampling
from moescope.models.view import MoELayer, MoEModel
from moescope.progress import track
from moescope.runs import Result

_VERSION = 1
"""Raised with every change of mathematics, so that nothing kept before it is read."""
_DOMAINS = 4
"""About how many domains a text has."""


def _work(model: MoEModel, options: OodOptions) -> float:
    sources = len(options.source_experts) or options.sources
    width = max(3 * layer.hidden_size * layer.intermediate_size for layer in model.layers)
    chosen = len(options.target_experts) or max(layer.num_experts for layer in model.layers)
    solver = options.fit_options().solver
    fits = len(HALVES) * sources * (chosen + (_DOMAINS + 1) * (1 + options.random))
    found = 6.0 * fits * solver.steps * solver.batch_tokens * width
    passes = (2 + 2 * _DOMAINS + 1) * sources + 1 if options.losses else 0
    return found + 2.0 * passes * options.tokens * parameters_met(model)


@analysis(
    question="Do adapters that were trained on one domain hold on the others?",
    source="MoE Align (future work); matched tokens, controls, losses, intervals ours",
    needs={"inputs", "live model"},
    options=OodOptions,
    work=_work,
)
def ood(material: Material, options: OodOptions) -> Result:
    """Domain by domain errors of adapters, beside linear maps and random experts, and losses.

    Raises:
        CaptureError: The capture lacks inputs, or tokens of a domain.
        OptionError: There is no such domain, layer or expert.
        ModelError: Losses are asked for, and the model is an encoder-decoder.
    """
    if options.losses:
        require_decoder_only(material.model)
    domains = _domains(material, options)
    source, target = _layers(material.model, options)
    capture = material.capture
    half = halves(capture, options.seed)
    samples = _samples(material, source, options, domains)
    targets = Targets(
        capture=capture,
        layer=target,
        experts=experts_of(target, options.target_experts),
        half=half,
        random=options.random,
        options=options.fit_options(),
    )
    folder = _folder(material, options, domains, targets)
    trained = []
    for expert, tested in track(
        [(expert, tested) for expert in samples for tested in HALVES], "ood: source experts"
    ):
        one = Trained(folder=folder, source=Source(source.index, expert), tested=tested)
        number = min(samples[expert].fewest(domains), options.max_train)
        work = Work.of(
            source, expert, samples[expert], tested=tested, domains=domains, number=number
        )
        one.train(work, targets)
        trained.append(one)
    losses = None
    if options.losses:
        losses = substituted(material, trained, targets, domains, options.tokens)
    resampling = Resampling(resamples=options.bootstrap, seed=options.seed)
    found = tables(errors_of(trained), losses, domains, resampling)
    return Result(
        name="ood",
        tables=found,
        findings=findings(found),
        provenance={"seed": options.seed, "adapters": str(folder.relative_to(material.run.path))},
    )


def _domains(material: Material, options: OodOptions) -> list[str]:
    known = material.capture.domains
    for domain in options.domains:
        if domain not in known:
            raise unknown("domain", domain, known)
    chosen = [domain for domain in known if domain in (options.domains or known)]
    if len(chosen) < 2:
        raise CaptureError(
            "the text has one domain: there is no other to test on",
            got=", ".join(chosen),
            remedy="Capture text of several domains",
        )
    return chosen


def _layers(model: MoEModel, options: OodOptions) -> tuple[MoELayer, MoELayer]:
    if options.source is not None and options.target is not None:
        return model.layer(options.source), model.layer(options.target)
    decoder = [layer for layer in model.layers if layer.stack == "decoder"]
    if len(decoder) < 2:
        raise OptionError(
            f"{model.name} has no pair of layers with experts",
            got=f"{len(decoder)} layer",
            remedy="Name the layer as `source` and as `target`",
        )
    return decoder[0], decoder[1]


def _samples(
    material: Material, layer: MoELayer, options: OodOptions, domains: Sequence[str]
) -> Mapping[int, Sample]:
    """Tokens of the source experts: those named, or those with most of their scarcest domain.

    Raises:
        CaptureError: An expert that is named has too few tokens of a domain, or all have.
    """
    experts = experts_of(layer, options.source_experts)
    half = halves(material.capture, options.seed)
    found = {
        expert: Sample.of(material.capture, recorded, half, domains, options.seed)
        for expert, recorded in material.capture.expert_samples(layer.index, experts).items()
    }
    fewest = {expert: sample.fewest(domains) for expert, sample in found.items()}
    chosen = [expert for expert in experts if usable(fewest[expert])]
    if not chosen or (options.source_experts and len(chosen) < len(experts)):
        raise CaptureError(
            f"experts of layer {layer.index} were given too few tokens of a domain to train and "
            "test on",
            got=", ".join(f"expert {expert}: {number}" for expert, number in fewest.items()),
            remedy="Capture with more tokens_per_expert, or more text; leave out a domain; or name "
            "other experts",
        )
    if not options.source_experts:
        chosen = sorted(chosen, key=lambda expert: -fewest[expert])[: options.sources]
    return {expert: found[expert] for expert in sorted(chosen)}


def _folder(
    material: Material, options: OodOptions, domains: Sequence[str], targets: Targets
) -> Path:
    key = {
        "version": _VERSION,
        "capture": material.capture.digest,
        "domains": domains,
        "target": [targets.layer.index, targets.experts],
        "random": options.random,
        "max_train": options.max_train,
        "fits": asdict(targets.options),
    }
    return material.run.parts_folder("ood", key)
