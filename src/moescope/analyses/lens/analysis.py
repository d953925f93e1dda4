"""What the model would say after each layer, with and without each expert (MoE Lens)."""

from typing import Any

from moescope.analyses.curves import Curve
from moescope.analyses.lens.corpus import Lens, corpus_table
from moescope.analyses.lens.findings import findings
from moescope.analyses.lens.options import LensOptions, operations
from moescope.analyses.lens.prompt import as_corpus, prompt_ids, prompt_table
from moescope.analyses.material import Material
from moescope.analyses.registry import analysis, of_capture
from moescope.corpora.corpus import RESERVED_DOMAIN
from moescope.decoding.translators import Translators
from moescope.evaluate.predictions import evaluating
from moescope.evaluate.totals import Resampling
from moescope.models.view import MoEModel
from moescope.runs import Result


def of_translators(material: Material, options: LensOptions) -> dict[str, Any]:
    """What a result rests on: the capture, and the translators."""
    folder = options.translators
    used = {} if folder is None else {"translators": Translators.digest(folder)}
    return of_capture(material, options) | used


@analysis(
    question="What would the model say after each layer, with and without each expert?",
    source="MoE Lens (logit lens; nostalgebraist 2020); full softmax, all positions and intervals "
    "ours",
    needs={"live model"},
    options=LensOptions,
    work=operations,
    basis=of_translators,
    curves=(
        Curve(
            measure="KL to the final prediction (nats)",
            table="lens",
            value="kl",
            limits=("kl_low", "kl_high"),
            where={"kind": "output", "domain": RESERVED_DOMAIN, "translated": False},
        ),
    ),
)
def lens(material: Material, options: LensOptions) -> Result:
    """Divergence from the final prediction, agreement and loss of every column of every layer."""
    model = material.model
    with evaluating(model):
        found = Lens.of(model, _translation(model, options))
        ids = prompt_ids(found, options.prompt) if options.prompt is not None else []
        corpus = material.text(options.tokens) if options.tokens else as_corpus(ids)
        resampling = Resampling(resamples=options.bootstrap, seed=options.seed)
        table = corpus_table(found, corpus, resampling)
        tables = {"lens": table}
        if ids:
            tables["prompt"] = prompt_table(found, ids)
    return Result(
        name="lens",
        tables=tables,
        findings=findings(table, model, options.translators),
        provenance={"seed": options.seed},
    )


def _translation(model: MoEModel, options: LensOptions) -> Translators | None:
    if options.translators is None:
        return None
    translators = Translators.load(options.translators)
    translators.require_model(model)
    return translators
