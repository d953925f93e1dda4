"""Losses of the held-out documents, kept so that an interrupted run goes on after them.

    RUN/results/substitute/KEY/unchanged.parquet, L1E0-zero.parquet, ...

KEY names everything that they depend on, but for what was taken out and what stands in for it.
"""

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

import pandas as pd

from moescope.analyses.fits import FITS_VERSION, Fits
from moescope.analyses.substitute.options import SubstituteOptions
from moescope.analyses.substitute.stand_ins import StandIn
from moescope.corpora.packing import Batch, rows_holding
from moescope.evaluate.predictions import evaluating
from moescope.evaluate.unpaired import summed_losses
from moescope.models.view import MoEModel
from moescope.runs import write_atomically

UNCHANGED = "unchanged"
_LONGEST_NAME = 80
_WHERE = ["domain", "document"]


class Losses:
    """Sums of losses over the tokens of each held-out document.

    Args:
        model: The model.
        batches: Rows that hold the documents, of which these tokens alone are kept.
        domains: Of the corpus.
        folder: Where the sums are kept.
    """

    def __init__(
        self, model: MoEModel, batches: Sequence[Batch], domains: Sequence[str], folder: Path
    ) -> None:
        self._model, self._batches = model, batches
        self.domains, self.folder = domains, folder
        self._known: dict[Path, pd.DataFrame] = {}

    @classmethod
    def of(cls, fits: Fits, options: SubstituteOptions) -> "Losses":
        """Those of the documents that no adapter has seen."""
        material = fits.material
        corpus = material.text(options.tokens)
        read = corpus.batches(material.model.tokenizer)
        batches = list(rows_holding(read, fits.tokens.held_out, corpus.packing.rows))
        key = {
            "version": FITS_VERSION,
            "capture": material.capture.digest,
            "options": {name: value for name, value in asdict(options).items() if name in _KEY},
        }
        folder = material.run.parts_folder("substitute", key)
        return cls(material.model, batches, corpus.domains, folder)

    def of_changed(self, stand_ins: Sequence[StandIn] = ()) -> pd.DataFrame:
        """With these in the place of their sources, all at once; of none: the model as it is.

        Returns:
            One row per domain number and document: tokens; loss, the sum in nats; difference from
            that of the model as it is.
        """
        documents = self._sums(stand_ins)
        before = self._sums([])["loss"] if stand_ins else documents["loss"]
        return documents.assign(difference=documents["loss"] - before)

    def by_domain(self, documents: pd.DataFrame) -> Mapping[str, pd.DataFrame]:
        """The documents of all domains, and of each that has some."""
        number = documents.index.get_level_values("domain")
        each = {name: documents[number == i] for i, name in enumerate(self.domains)}
        return {"all": documents} | {name: frame for name, frame in each.items() if len(frame)}

    def _sums(self, stand_ins: Sequence[StandIn]) -> pd.DataFrame:
        name = "+".join(sorted(stand_in.name for stand_in in stand_ins)) or UNCHANGED
        if len(name) > _LONGEST_NAME:
            name = hashlib.sha256(name.encode()).hexdigest()[:20]
        path = self.folder / f"{name}.parquet"
        if path not in self._known:
            if not path.exists():
                sums = self._measured(stand_ins)
                write_atomically(path, sums.reset_index().to_parquet)
            self._known[path] = pd.read_parquet(path).set_index(_WHERE)
        return self._known[path]

    def _measured(self, stand_ins: Sequence[StandIn]) -> pd.DataFrame:
        with ExitStack() as stack:
            stack.enter_context(evaluating(self._model))
            for stand_in in stand_ins:
                stack.enter_context(stand_in.enter())
            totals = summed_losses(self._model, self._batches, self.domains)
        _, documents = next(totals.by_domain())
        return documents.rename_axis(index=_WHERE)


_KEY = ("rank", "held_out_share", "max_tokens", "tokens", "seed")
"""Options that losses of one name depend on."""
