"""The lens over a corpus: how far each column is from what the model says in the end."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from moescope.corpora.corpus import Corpus
from moescope.corpora.packing import Batch
from moescope.decoding.columns import Column, columns_of, watch
from moescope.decoding.endings import Ending, endings
from moescope.decoding.lens import Translation, decoded
from moescope.errors import CorpusError
from moescope.evaluate.predictions import Targets
from moescope.evaluate.totals import Resampling, Totals, counts, mean_columns
from moescope.models.readout import Readout
from moescope.models.view import MoEModel
from moescope.progress import track


@dataclass(frozen=True, eq=False, kw_only=True)
class Lens:
    """What a lens needs of a model."""

    readout: Readout
    """Final norm and unembedding."""
    endings: list[Ending]
    """The decoder layers with sparse blocks."""
    translation: Translation | None = None
    """Put before the readout (a tuned lens)."""

    @classmethod
    def of(cls, model: MoEModel, translation: Translation | None = None) -> "Lens":
        """Find it.

        Raises:
            ModelError: The model has no language-model head, no sparse layer in its decoder, or
                several residual streams.
        """
        return cls(readout=Readout.of(model), endings=endings(model), translation=translation)

    @property
    def measures(self) -> list[str]:
        """Of every position; a text says nothing about what an encoder-decoder should say next."""
        about_text = not self.readout.model.model.config.is_encoder_decoder
        return ["kl", "agreement", *(["loss"] if about_text else [])]


def corpus_table(lens: Lens, corpus: Corpus, resampling: Resampling) -> pd.DataFrame:
    """Means over all predictions of a corpus, by layer, column and domain.

    Of a batch nothing is kept but sums per document.

    Raises:
        CorpusError: The text cannot be read, or holds nothing to predict.
    """
    totals: dict[tuple[int, Column], Totals] = {}
    tokenizer = lens.readout.model.tokenizer
    for batch in track(corpus.batches(tokenizer), "lens: batches"):
        for key, targets, values in _read(lens, batch):
            if len(targets.ids):
                total = totals.setdefault(key, Totals(corpus.domains))
                total.add(targets, dict(zip(lens.measures, values, strict=True)))
    if not totals:
        raise CorpusError(
            "the text has no prediction that counts", remedy="Take one of two tokens or more"
        )
    rows: list[dict[str, object]] = []
    for number, ending in enumerate(lens.endings):
        layer = ending.layer
        for column in columns_of(layer):
            place: dict[str, object] = {
                "stack": layer.stack,
                "layer": layer.index,
                "column": column.label(layer),
                "translated": lens.translation is not None and column.has_stream,
            }
            place |= column._asdict()
            if (number, column) not in totals:
                rows.append(place | {"domain": "all", "n_tokens": 0, "status": "undefined"})
                continue
            for domain, documents in totals[number, column].by_domain():
                means = mean_columns(documents, lens.measures, resampling)
                rows.append(place | {"domain": domain} | means | counts(documents, resampling))
    return pd.DataFrame(rows)


def _read(lens: Lens, batch: Batch) -> list[tuple[tuple[int, Column], Targets, Tensor]]:
    """Every column with the predictions for which it exists and their measures."""
    targets = Targets.of(batch, lens.readout.device)
    last, layers = watch(
        lens.readout, lens.endings, batch.input_ids, batch.attention_mask, targets.positions
    )
    found: dict[tuple[int, Column], list[Tensor]] = {}
    for part in decoded(lens.readout, last, layers, lens.translation):
        values = [part.states.used(part.column).float(), part.divergence, part.agreement]
        if "loss" in lens.measures:
            values.append(part.loss(targets.ids[part.positions]))
        measured = torch.stack([value.cpu() for value in values])
        found.setdefault((part.number, part.column), []).append(measured)
    return [(key, *_existing(targets, parts)) for key, parts in found.items()]


def _existing(targets: Targets, parts: Sequence[Tensor]) -> tuple[Targets, Tensor]:
    used, *values = torch.cat(list(parts), dim=1)
    exists = used.bool()
    kept: dict[str, Any] = {
        "positions": targets.positions[exists.to(targets.positions.device)],
        "ids": targets.ids[exists.to(targets.ids.device)],
        "documents": targets.documents[exists],
        "domains": targets.domains[exists],
    }
    return replace(targets, **kept), torch.stack(values)[:, exists]
