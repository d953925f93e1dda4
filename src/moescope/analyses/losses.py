"""Losses of changed models by document, kept so that an interrupted run goes on after them.

    RUN/results/ANALYSIS/KEY/unchanged.parquet, NAME.parquet, ...

KEY names everything that losses depend on, but for the change that NAME names.
"""

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import pandas as pd

from moescope.analyses.fits import FITS_VERSION, Fits
from moescope.corpora.corpus import RESERVED_DOMAIN
from moescope.corpora.packing import Batch
from moescope.corpora.rows import rows_holding
from moescope.evaluate.predictions import evaluating
from moescope.evaluate.unpaired import summed_losses
from moescope.models.view import MoEModel
from moescope.progress import track
from moescope.runs import read_table, write_atomically

Change = Callable[[], AbstractContextManager[object]]
"""Makes a context that changes the model."""
Setting = TypeVar("Setting", bound=tuple[object, ...])
UNCHANGED = "unchanged"
_LONGEST_NAME = 80
_WHERE = ["domain", "document"]


@dataclass(frozen=True, eq=False, kw_only=True)
class Losses:
    """What a model loses on some rows of text."""

    model: MoEModel
    """The model, decoder-only."""
    batches: Sequence[Batch]
    """The rows."""
    domains: Sequence[str]
    """Names of the domains of the corpus."""
    folder: Path
    """Where sums are kept."""

    @classmethod
    def held_out(
        cls, fits: Fits, tokens: int, analysis: str, options: Mapping[str, object]
    ) -> "Losses":
        """Those of the documents that no adapter has seen.

        Args:
            fits: Model, text, and which documents are held out.
            tokens: Most tokens of text to read.
            analysis: Whose folder they are kept in.
            options: What the changes depend on, but for their names.

        Raises:
            CorpusError: None of the documents lies in that part of the text.
            CaptureError: The text is another one than the captured, or cannot be found again.
        """
        material = fits.material
        corpus = material.text(tokens)
        read = corpus.batches(material.model.tokenizer)
        key = {
            "version": FITS_VERSION,
            "capture": material.capture.digest,
            "options": {**options, "tokens": tokens},
        }
        return cls(
            model=material.model,
            batches=list(rows_holding(read, fits.tokens.held_out, corpus.packing.rows)),
            domains=corpus.domains,
            folder=material.run.parts_folder(analysis, key),
        )

    def of(self, name: str, change: Change) -> pd.DataFrame:
        """While a change lasts.

        Args:
            name: Of the change: two of one name are the same.
            change: What makes it.

        Returns:
            One row per domain, by name, and document, by running number: tokens; loss, its sum, in
            nats; difference from that of the model as it is.

        Raises:
            ModelError: The change is refused.
            OptionError: The same.
        """
        documents, before = self._sums(name, change), self.unchanged
        return documents.assign(difference=documents["loss"] - before["loss"])

    def of_all(
        self, changes: Mapping[Setting, Change], description: str
    ) -> dict[Setting, pd.DataFrame]:
        """The same for many changes, each named by the parts of its setting; shows progress."""
        return {
            setting: self.of("-".join(map(str, setting)), change)
            for setting, change in track(changes.items(), description)
        }

    @cached_property
    def unchanged(self) -> pd.DataFrame:
        """Tokens and loss of the model as it is; see `of`."""
        return self._sums(UNCHANGED, nullcontext)

    def _sums(self, name: str, change: Change) -> pd.DataFrame:
        path = self.folder / f"{_file_name(name)}.parquet"
        if not path.exists():
            write_atomically(path, self._measured(change).reset_index().to_parquet)
        found = read_table(path)
        names = found["domain"].map(dict(enumerate(self.domains)))
        return found.assign(domain=names).set_index(_WHERE)

    def _measured(self, change: Change) -> pd.DataFrame:
        with evaluating(self.model), change():
            totals = summed_losses(self.model, self.batches, self.domains)
        _, documents = next(totals.by_domain())
        return documents.rename_axis(index=_WHERE)


@contextmanager
def entered(changes: Sequence[AbstractContextManager[object]]) -> Iterator[None]:
    """All of them, as one."""
    with ExitStack() as stack:
        for change in changes:
            stack.enter_context(change)
        yield


def _file_name(name: str) -> str:
    if len(name) <= _LONGEST_NAME and re.fullmatch(r"[\w' .+-]+", name):
        return name
    return hashlib.sha256(name.encode()).hexdigest()[:20]


def by_domain(documents: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The documents of all domains, and of each that has some."""
    each = documents.groupby(level="domain", sort=False)
    return {RESERVED_DOMAIN: documents} | {str(name): frame for name, frame in each}
