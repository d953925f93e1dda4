"""Losses of changed models by document, kept so that an interrupted run goes on after them.

RUN/results/ANALYSIS/KEY/NAME.parquet
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from moescope.corpora.packing import Batch, rows_holding
from moescope.errors import ModelError, OptionError
from moescope.evaluate.predictions import evaluating
from moescope.evaluate.unpaired import summed_losses
from moescope.models.view import MoEModel
from moescope.runs import write_atomically

_TENSORS = ("input_ids", "attention_mask", "kept", "documents", "domains")
Change = Callable[[], AbstractContextManager[None]]


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

    def of(self, name: str, change: Change) -> pd.DataFrame | None:
        """Sums per document while a change lasts; None where it is refused.

        Args:
            name: Of the file.
            change: What makes a context that changes the model.

        Returns:
            domain, its number; document, its running number; tokens; loss, in nats, their sum.
        """
        path = self.folder / f"{name}.parquet"
        if not path.exists():
            try:
                found = self._read(change)
            except (ModelError, OptionError):
                return None
            write_atomically(path, found.to_parquet)
        return pd.read_parquet(path)

    def _read(self, change: Change) -> pd.DataFrame:
        with evaluating(self.model), change():
            totals = summed_losses(self.model, self.batches, self.domains)
        _, documents = next(totals.by_domain())
        return documents.rename_axis(["domain", "document"]).reset_index()


def rows_in_turn(
    batches: Iterable[Batch], documents: Bool[Tensor, " documents"], tokens: int, rows: int
) -> list[Batch]:
    """Rows of chosen documents, until they hold so many tokens of them.

    Domains take turns, and within each its documents do: few tokens are those of many documents
    then, which intervals need.

    Args:
        batches: A corpus; tokens of other documents in these rows are context.
        documents: Which of its documents, by running number.
        tokens: About how many to take; all if there are fewer.
        rows: Rows per batch.
    """
    held = list(rows_holding(batches, documents, rows))
    if not held:
        return []
    tensors = {name: torch.cat([getattr(batch, name) for batch in held]) for name in _TENSORS}
    order = _in_turn(tensors)
    sizes = tensors["kept"].sum(1)[order]
    chosen = order[sizes.cumsum(0) - sizes < tokens].sort().values
    return [
        Batch(**{name: t[some] for name, t in tensors.items()}, first_row=0, document_names={})
        for some in torch.split(chosen, rows)
    ]


def _in_turn(rows: Mapping[str, Tensor]) -> Int64[Tensor, " rows"]:
    """Rows in the order in which they are taken."""
    turns = torch.tensor(list(_turns(rows["documents"], rows["kept"])))
    domains = rows["domains"].max(1).values
    order = turns.argsort(stable=True)
    place = torch.zeros_like(turns)
    for domain in torch.unique(domains):
        own = order[domains[order] == domain]
        place[own] = torch.arange(len(own))
    return place.argsort(stable=True)


def _turns(documents: Tensor, kept: Tensor) -> Iterator[int]:
    """For each row how many rows before it hold the one of its documents that has fewest."""
    seen: Counter[int] = Counter()
    for row, counted in zip(documents, kept, strict=True):
        here = row[counted].unique().tolist()
        yield min(seen[document] for document in here)
        seen.update(here)
