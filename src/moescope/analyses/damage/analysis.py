"""Which measure of experts foretells what their removal, swap or replacement costs."""

from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict

import pandas as pd

from moescope.analyses.damage.findings import findings
from moescope.analyses.damage.known import known_measures
from moescope.analyses.damage.options import DamageOptions
from moescope.analyses.damage.tables import (
    by_kind,
    changes_table,
    correlation_tables,
    reliability_table,
)
from moescope.analyses.damage.trials import Trial, change, draw_pairs, experts_of, trials
from moescope.analyses.fits import FITS_VERSION, Fits
from moescope.analyses.losses import Losses
from moescope.analyses.material import Material
from moescope.analyses.registry import analysis
from moescope.analyses.work import parameters_met
from moescope.corpora.packing import Batch
from moescope.corpora.rows import rows_in_turn
from moescope.errors import ModelError
from moescope.evaluate.predictions import require_decoder_only
from moescope.evaluate.totals import Resampling
from moescope.models.view import MoEModel
from moescope.progress import track
from moescope.runs import Result

_LOSSES_VERSION = 1
"""Raised with every change of what losses are of, so that none kept before it is read."""


def _work(model: MoEModel, options: DamageOptions) -> float:
    experts = sum(layer.num_experts for layer in model.layers)
    pairs = min(options.pairs, experts // 2)
    passes = 2 * experts + 2 * pairs + options.measure_tokens / options.tokens
    width = max(3 * layer.hidden_size * layer.intermediate_size for layer in model.layers)
    solver = options.fit_options().solver
    fits = (experts * options.targets + 2 * pairs) * solver.steps * solver.batch_tokens
    return 2.0 * passes * options.tokens * parameters_met(model) + 6.0 * fits * width


@analysis(
    question="Which measure of experts foretells what ablating, swapping or replacing them costs?",
    source="A Closer Look into MoE, REAP, MoE Align (measures); damage, intervals, pairing ours",
    needs={"inputs", "live model"},
    options=DamageOptions,
    work=_work,
)
def damage(material: Material, options: DamageOptions) -> Result:
    """Measured loss changes against every measure of other documents.

    Raises:
        CaptureError: The capture lacks inputs, or samples of the experts.
        CorpusError: The text cannot be read.
        ModelError: The model is an encoder-decoder.
    """
    model = material.model
    require_decoder_only(model)
    fits = Fits.of(
        material,
        options.fit_options(),
        held_out_share=options.held_out_share,
        max_tokens=options.max_tokens,
    )
    experts = experts_of(model)
    pairs = draw_pairs(model, experts, options.pairs, options.seed)
    known = known_measures(
        fits, _rows(fits, options.measure_tokens, held_out=False), experts, pairs, options
    )
    batches = _rows(fits, options.tokens, held_out=True)
    key = {
        "version": [_LOSSES_VERSION, FITS_VERSION],
        "capture": material.capture.digest,
        "held_out": fits.tokens.held_out.tolist(),
        "tokens": options.tokens,
        "fits": [asdict(fits.options), options.max_tokens],
    }
    losses = Losses(
        model=model,
        batches=batches,
        domains=material.capture.domains,
        folder=material.run.parts_folder("damage", key),
    )
    planned = trials(experts, pairs, model)
    found = _made(planned, fits, losses)
    measured = by_kind(planned, found, known)
    correlations, differences = correlation_tables(measured, options.seed)
    tables = {
        "damage": correlations,
        "changes": changes_table(
            measured, Resampling(resamples=options.bootstrap, seed=options.seed)
        ),
        "differences": differences,
        "reliability": reliability_table(measured, options.halves, options.seed),
    }
    return Result(
        name="damage",
        tables=tables,
        findings=findings(tables, Counter(t.kind for t in planned if t not in found)),
        provenance={"seed": options.seed},
    )


def _made(planned: Sequence[Trial], fits: Fits, losses: Losses) -> dict[Trial, pd.DataFrame]:
    """Losses of the changes that can be made."""
    found = {}
    for trial in track(planned, "damage: losses"):
        if (made := change(trial, fits)) is not None:
            with suppress(ModelError):
                found[trial] = losses.of(trial.name, made)
    return found


def _rows(fits: Fits, tokens: int, *, held_out: bool) -> list[Batch]:
    """Some rows of the held-out documents, or of the others."""
    model, corpus = fits.material.model, fits.material.text()
    held = fits.tokens.held_out
    return rows_in_turn(
        corpus.batches(model.tokenizer),
        held if held_out else ~held,
        tokens,
        corpus.packing.rows,
    )
