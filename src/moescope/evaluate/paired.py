"""What interventions do to a model's predictions, on the same tokens."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from moescope.corpora.corpus import Corpus
from moescope.corpora.packing import Batch
from moescope.corpora.rows import rows_holding
from moescope.errors import ModelError, OptionError
from moescope.evaluate.predictions import Targets, evaluating, forward, require_decoder_only
from moescope.evaluate.totals import (
    Resampling,
    Totals,
    counts,
    difference_columns,
    mean_columns,
)
from moescope.models.view import MoEModel
from moescope.progress import track

BASELINE = "baseline"
"""In tables: the model as it is."""
Interventions = Mapping[str, Callable[[], AbstractContextManager[object]]]
"""By name: what makes a context manager that changes the model and restores it."""


def compare(
    model: MoEModel,
    corpus: Corpus,
    interventions: Interventions,
    *,
    documents: Bool[Tensor, " documents"] | None = None,
    bootstrap: int = 1_000,
    seed: int = 0,
) -> pd.DataFrame:
    """Losses with and without each intervention, and how far the predictions move.

    One pass over the corpus: each batch goes through the model as it is and then through every
    changed one, so that all see the same tokens and differences are paired. At most two batches of
    logits are held. Which predictions count: `moescope.evaluate.predictions.Targets`.

    Args:
        model: The model; it is put into evaluation mode meanwhile.
        corpus: The text, read with the model's own tokenizer.
        interventions: What to compare with; each is entered once per batch.
        documents: Which documents count, by running number; others are read only where they share
            rows with these. None: all.
        bootstrap: Resamples of documents behind each 95% interval.
        seed: Seed of the resamples.

    Returns:
        One row per intervention, the first of them "baseline", and domain, the first of them
        "all". intervention, domain; loss per token in nats; difference of the loss from the
        baseline; kl, the Kullback-Leibler divergence KL(baseline || changed) per token in nats;
        flips, the share of tokens whose most probable prediction changes; each with its 95%
        limits over documents (_low, _high; NaN under 30 documents); n_tokens, n_documents, status,
        seed.

    Raises:
        CorpusError: The text cannot be read, or holds nothing to predict, or none of `documents`.
        ModelError: The model is an encoder-decoder, or an intervention did not restore its weights.
        OptionError: An intervention is called "baseline", or is itself a context manager.
    """
    check_interventions(interventions)
    resampling = Resampling(resamples=bootstrap, seed=seed)
    totals = {name: Totals(corpus.domains) for name in (BASELINE, *interventions)}
    before = model.fingerprint
    require_decoder_only(model)
    batches = corpus.batches(model.tokenizer)
    if documents is not None:
        batches = rows_holding(batches, documents, corpus.packing.rows)
    with evaluating(model):
        for batch in track(batches, "compare: batches"):
            _compare_batch(model, batch, interventions, totals)
    if model.fingerprint != before:
        raise ModelError(
            "an intervention did not restore the weights of the model, so that nothing here can "
            "be compared",
            remedy="Load the model again, and undo the change when the context ends",
        )
    rows = [
        {"intervention": name, "domain": domain} | _columns(documents, resampling)
        for name, total in totals.items()
        for domain, documents in total.by_domain()
    ]
    return pd.DataFrame(rows)


def check_interventions(interventions: Interventions) -> None:
    """Refuse what cannot be entered again and again, and the name of the model as it is.

    Raises:
        OptionError: An intervention is called "baseline", or is itself a context manager.
    """
    if BASELINE in interventions:
        raise OptionError(
            f"no intervention may be called {BASELINE!r}: tables use it for the model as it is",
            remedy="Give it another name",
        )
    for name, intervention in interventions.items():
        if isinstance(intervention, AbstractContextManager):  # most can be entered only once
            raise OptionError(
                f"the intervention {name!r} is a context manager",
                expected="a function that makes one",
                remedy="Put `lambda:` before it",
            )


def _compare_batch(
    model: MoEModel, batch: Batch, interventions: Interventions, totals: Mapping[str, Totals]
) -> None:
    """Run one batch through the model as it is and through each changed one."""
    baseline = forward(model, batch)
    targets = Targets.of(batch, baseline.device)
    totals[BASELINE].add(targets, _moved(baseline, baseline, targets))
    for name, intervention in interventions.items():
        with intervention():
            totals[name].add(targets, _moved(baseline, forward(model, batch), targets))


def _columns(documents: pd.DataFrame, resampling: Resampling) -> dict[str, object]:
    means = mean_columns(documents, ["loss", "kl", "flips"], resampling)
    difference = difference_columns(documents, "difference", resampling)
    loss = {name: means.pop(name) for name in ("loss", "loss_low", "loss_high")}
    return loss | difference | means | counts(documents, resampling)


def _moved(
    baseline: Float[Tensor, "positions vocabulary"],
    changed: Float[Tensor, "positions vocabulary"],
    targets: Targets,
) -> dict[str, Float[Tensor, " counted"]]:
    """Loss, its difference, divergence and flip at each target."""
    parts = []
    for positions, ids in targets.chunks(baseline.shape[1]):
        p, q = (logits[positions].float().log_softmax(-1) for logits in (baseline, changed))
        loss_p, loss_q = (-log.gather(1, ids[:, None])[:, 0] for log in (p, q))
        flips = p.argmax(-1) != q.argmax(-1)
        terms = torch.where(p.isneginf(), 0, p.exp() * (p - q))  # 0 log 0 is 0
        divergence = terms.sum(-1).clamp_min(0)  # rounding may go below zero
        parts.append(torch.stack([loss_q, loss_q - loss_p, divergence, flips.float()]))
    loss, difference, kl, flips = torch.cat(parts, dim=1)
    return {"loss": loss, "difference": difference, "kl": kl, "flips": flips}
