"""How well a model predicts a text, by domain."""

from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd

from moescope.corpora.corpus import Corpus
from moescope.corpora.packing import Batch
from moescope.evaluate.predictions import (
    Targets,
    evaluating,
    forward,
    losses,
    require_decoder_only,
)
from moescope.evaluate.totals import Resampling, Totals, counts, mean_columns
from moescope.models.view import MoEModel
from moescope.progress import track


def loss(model: MoEModel, corpus: Corpus, *, bootstrap: int = 1_000, seed: int = 0) -> pd.DataFrame:
    """Token-weighted negative log-likelihood in nats, and perplexity, for all and by domain.

    The loss of a domain is the mean over its tokens, not over documents; perplexity is its
    exponential. Which predictions count: `moescope.evaluate.predictions.Targets`. Called within an
    intervention, it measures the changed model; `compare` measures what the change does.

    Args:
        model: The model; it is put into evaluation mode meanwhile.
        corpus: The text, read with the model's own tokenizer.
        bootstrap: Resamples of documents behind each 95% interval.
        seed: Seed of the resamples.

    Returns:
        One row for all and one per domain: domain, loss, loss_low, loss_high, perplexity,
        perplexity_low, perplexity_high, n_tokens, n_documents, status, seed. Limits are NaN and
        the status is few_documents under 30 documents.

    Raises:
        CorpusError: The text cannot be read, or holds nothing to predict.
        ModelError: The model is an encoder-decoder.
    """
    resampling = Resampling(resamples=bootstrap, seed=seed)
    require_decoder_only(model)
    batches = track(corpus.batches(model.tokenizer), "evaluate: batches")
    totals = summed_losses(model, batches, corpus.domains)
    rows = []
    for domain, documents in totals.by_domain():
        found = mean_columns(documents, ["loss"], resampling)
        perplexity = {
            name.replace("loss", "perplexity"): float(np.exp(value))
            for name, value in found.items()
        }
        rows.append({"domain": domain} | found | perplexity | counts(documents, resampling))
    return pd.DataFrame(rows)


def summed_losses(model: MoEModel, batches: Iterable[Batch], domains: Sequence[str]) -> Totals:
    """Sums per document of `loss`, in nats, in evaluation mode, with the changes that hold now.

    Args:
        model: The model, decoder-only.
        batches: The text.
        domains: Names of its domains.
    """
    totals = Totals(domains)
    with evaluating(model):
        for batch in batches:
            _add_batch(totals, model, batch)
    return totals


def _add_batch(totals: Totals, model: MoEModel, batch: Batch) -> None:
    """Add one batch, whose logits do not outlive it."""
    logits = forward(model, batch)
    targets = Targets.of(batch, logits.device)
    totals.add(targets, {"loss": losses(logits, targets)})
