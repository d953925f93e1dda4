"""Measures of every lens on held-out documents, and the tables that they give."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import pandas as pd
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from moescope.corpora.packing import Batch
from moescope.decoding.lens import chunks, divergence, log_probabilities
from moescope.decoding.training_states import States, StateSource, belongs
from moescope.decoding.translators import Translators
from moescope.errors import CorpusError
from moescope.evaluate.predictions import Targets, evaluating
from moescope.evaluate.totals import Resampling, Totals, counts, difference_columns, mean_columns
from moescope.progress import track

MEASURES = ("kl", "agreement", "loss")
"""KL(final || lens) in nats; 1 where the likeliest token is the model's; negative log-likelihood of
the next token in nats, which an encoder-decoder was not trained for on a plain text."""
AGAINST = ("logit", "debiased", "constant")
"""What the tuned lens is held against."""

Columns = dict[str, Float[Tensor, " tokens"]]


class Judged(NamedTuple):
    """Whose predictions."""

    lens: str
    """`logit`, `debiased` or `tuned`; `constant`, `model`."""
    layer: int | None
    """The model's own number; None for the last two, which have no layer."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Lenses:
    """What is compared."""

    source: StateSource
    """The states that are decoded."""
    translators: Mapping[str, Translators]
    """By name of the lens."""
    constant: Float[Tensor, " vocabulary"]
    """Log probabilities that look at nothing."""

    def judge(self) -> dict[Judged, Totals]:
        """Sums per held-out document of every measure; of the tuned lens also its differences.

        Raises:
            CorpusError: The text cannot be read, or holds nothing to predict.
        """
        source, totals = self.source, dict[Judged, Totals]()
        model = source.readout.model
        with evaluating(model):
            batches = source.corpus.batches(model.tokenizer)
            for batch in track(batches, "tuned lens: held-out batches"):
                targets = _held_out(batch, source)
                if not len(targets.positions):
                    continue
                states = source.at(batch, targets.positions)
                for judged, columns in self._columns(states, targets).items():
                    total = totals.setdefault(judged, Totals(source.corpus.domains))
                    total.add(targets, columns)
        if not totals:
            raise CorpusError(
                "no held-out document has anything to predict", remedy="Take more documents"
            )
        return totals

    def _columns(self, states: States, targets: Targets) -> dict[Judged, Columns]:
        parts = [
            self._measured(States(states.last[some], states.layers[:, some]), targets.ids[some])
            for some in chunks(self.source.readout, len(states.last))
        ]
        return {
            judged: {name: torch.cat([part[judged][name] for part in parts]) for name in columns}
            for judged, columns in parts[0].items()
        }

    def _measured(self, states: States, ids: Int64[Tensor, " tokens"]) -> dict[Judged, Columns]:
        final = log_probabilities(self.source.readout, states.last)
        constant = self._measures(final, self.constant.to(final).expand_as(final), ids)
        measured = {
            Judged("model", None): self._measures(final, final, ids),
            Judged("constant", None): constant,
        }
        for number, layer in enumerate(self.source.layers):
            found = {"constant": constant}
            for lens, translators in self.translators.items():
                own = log_probabilities(
                    self.source.readout, translators(layer, states.layers[number])
                )
                found[lens] = self._measures(final, own, ids)
                measured[Judged(lens, layer)] = found[lens]
            differences = {
                _difference(name, other): found["tuned"][name] - found[other][name]
                for other in AGAINST
                for name in constant
            }
            measured[Judged("tuned", layer)] = found["tuned"] | differences
        return measured

    def _measures(
        self,
        final: Float[Tensor, "tokens vocabulary"],
        own: Float[Tensor, "tokens vocabulary"],
        ids: Int64[Tensor, " tokens"],
    ) -> Columns:
        measures = {
            "kl": divergence(final, own),
            "agreement": (own.argmax(-1) == final.argmax(-1)).float(),
        }
        if not self.source.readout.model.model.config.is_encoder_decoder:
            measures["loss"] = -own.gather(1, ids[:, None])[:, 0]
        return measures


def _held_out(batch: Batch, source: StateSource) -> Targets:
    targets = Targets.of(batch, source.readout.device)
    chosen = belongs(targets.documents, "held_out", source.seed)
    there = chosen.to(targets.positions.device)
    return Targets(
        positions=targets.positions[there],
        ids=targets.ids[there],
        documents=targets.documents[chosen],
        domains=targets.domains[chosen],
    )


def _difference(measure: str, other: str) -> str:
    return f"{measure} against {other}"


def lens_table(totals: Mapping[Judged, Totals], resampling: Resampling) -> pd.DataFrame:
    """A row per lens, layer and domain, with 95% intervals over held-out documents.

    The rows of `constant` and `model` have no layer.
    """
    return pd.DataFrame(
        {"lens": judged.lens, "layer": judged.layer, "domain": domain}
        | mean_columns(documents, _present(documents), resampling)
        | counts(documents, resampling)
        for judged, domain, documents in _by_domain(totals)
    ).astype({"layer": "Int64"})


def gain_table(totals: Mapping[Judged, Totals], resampling: Resampling) -> pd.DataFrame:
    """The tuned lens minus each other prediction, on the same tokens, by layer and domain."""
    rows = []
    for judged, domain, documents in _by_domain(totals):
        for other in AGAINST if judged.lens == "tuned" else ():
            row: dict[str, object] = {"layer": judged.layer, "against": other, "domain": domain}
            for measure in _present(documents):
                found = difference_columns(documents, _difference(measure, other), resampling)
                row |= {key.replace(f" against {other}", ""): v for key, v in found.items()}
            rows.append(row | counts(documents, resampling))
    return pd.DataFrame(rows)


def _present(documents: pd.DataFrame) -> list[str]:
    return [measure for measure in MEASURES if measure in documents]


def _by_domain(
    totals: Mapping[Judged, Totals],
) -> Iterator[tuple[Judged, str, pd.DataFrame]]:
    for judged, total in totals.items():
        for domain, documents in total.by_domain():
            yield judged, domain, documents
