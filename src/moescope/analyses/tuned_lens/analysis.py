"""A lens with a trained affine map per layer, beside the logit lens (Belrose et al. 2023)."""

import json
from pathlib import Path
from typing import Any

import pandas as pd

from moescope.analyses.curves import Curve
from moescope.analyses.material import Material
from moescope.analyses.registry import analysis, of_capture
from moescope.analyses.tuned_lens.controls import Controls
from moescope.analyses.tuned_lens.findings import findings
from moescope.analyses.tuned_lens.options import TunedLensOptions, operations
from moescope.analyses.tuned_lens.tables import Lenses, gain_table, lens_table
from moescope.corpora.corpus import RESERVED_DOMAIN, Corpus
from moescope.decoding.training import fit, training_key
from moescope.decoding.training_states import StateSource
from moescope.decoding.translators import Translators
from moescope.evaluate.totals import Resampling
from moescope.models.view import MoEModel
from moescope.runs import Result, to_json


def _folder(material: Material) -> Path:
    return material.run.path / "translators"


def of_translators(material: Material, options: TunedLensOptions) -> dict[str, Any]:
    """What a result rests on: the capture, and the translators beside it."""
    return of_capture(material, options) | {"translators": Translators.digest(_folder(material))}


@analysis(
    question="What would the states after each layer predict, put in the terms of the last one?",
    source="Tuned lens (Belrose et al. 2023, arXiv 2303.08112)",
    needs={"live model"},
    options=TunedLensOptions,
    work=operations,
    basis=of_translators,
    curves=(
        Curve(
            measure="KL to the final prediction (nats)",
            table="tuned-lens",
            value="kl",
            limits=("kl_low", "kl_high"),
            where={"lens": "tuned", "domain": RESERVED_DOMAIN},
        ),
    ),
)
def tuned_lens(material: Material, options: TunedLensOptions) -> Result:
    """Trains the translators of the sparse decoder layers, and holds them against the logit lens.

    They are kept in RUN/translators, and used again where model, text and training are the same.
    """
    model, corpus = material.model, material.text(options.tokens)
    translators = trained(model, corpus, options, _folder(material))
    return judged(model, corpus, translators, options)


def trained(
    model: MoEModel, corpus: Corpus, options: TunedLensOptions, folder: Path
) -> Translators:
    """The translators in a folder, trained first unless they are those that are asked for.

    Raises:
        ModelError: Those in the folder are damaged; the states of the model cannot be decoded.
        CorpusError: The text has too few documents, or cannot be read.
    """
    if Translators.present(folder):
        found = Translators.load(folder)
        key = json.loads(to_json(training_key(corpus, options)))
        same = all(found.training.get(name) == value for name, value in key.items())
        if same and found.model_fingerprint == model.fingerprint:
            return found
    translators = fit(model, corpus, options)
    translators.save(folder)
    return translators


def judged(
    model: MoEModel, corpus: Corpus, translators: Translators, options: TunedLensOptions
) -> Result:
    """The lenses on the held-out documents, for any model and text.

    Raises:
        ModelError: The states of the model cannot be decoded.
        CorpusError: The text has too few documents, or cannot be read.
    """
    source = StateSource.of(model, corpus, options.seed)
    controls = Controls.of(source, translators.model_fingerprint)
    lenses = Lenses(
        source=source,
        translators={
            "logit": Translators.identity(model, source.layers),
            "debiased": controls.debiased,
            "tuned": translators,
        },
        constant=controls.constant,
    )
    totals = lenses.judge()
    resampling = Resampling(resamples=options.bootstrap, seed=options.seed)
    table, gains = lens_table(totals, resampling), gain_table(totals, resampling)
    course = pd.DataFrame(translators.training["course"])
    return Result(
        name="tuned-lens",
        tables={"tuned-lens": table, "gains": gains, "training": course},
        findings=findings(table, gains, course),
        provenance={
            "seed": options.seed,
            "training_tokens": translators.training["tokens"],
            "control_tokens": controls.tokens,
        },
    )
