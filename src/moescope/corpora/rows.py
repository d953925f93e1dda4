"""Rows of a corpus: those of chosen documents, gathered into batches again."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from moescope.corpora.packing import Batch
from moescope.errors import CorpusError

_TENSORS = ("input_ids", "attention_mask", "kept", "documents", "domains")
Rows = Mapping[str, Tensor]
"""The tensors of a batch of any size, by name."""


def joined(batches: Iterable[Batch]) -> Rows:
    """The rows of all batches together."""
    tensors = [{name: getattr(batch, name) for name in _TENSORS} for batch in batches]
    return {name: torch.cat([each[name] for each in tensors]) for name in _TENSORS}


def batched(rows: Rows, chosen: Int64[Tensor, " chosen"], number: int) -> list[Batch]:
    """Chosen rows, in that order, so many of them per batch."""
    return [
        Batch(
            **{name: tensor[chosen[start : start + number]] for name, tensor in rows.items()},
            first_row=0,
            document_names={},
        )
        for start in range(0, len(chosen), number)
    ]


def rows_holding(
    batches: Iterable[Batch], documents: Bool[Tensor, " documents"], rows: int
) -> Iterator[Batch]:
    """The rows that hold tokens of chosen documents, gathered into batches again.

    Only tokens of these documents are kept (`Batch.kept`); the others of their rows are context.

    Args:
        batches: A corpus.
        documents: Which of its documents, by running number.
        rows: Rows per batch.

    Raises:
        CorpusError: No token is of these documents, or there are more documents than are told of.
    """
    waiting, found = list[Batch](), False
    for batch in batches:
        waiting += batched(*_of_documents(batch, documents), 1)
        found = found or bool(waiting)
        while len(waiting) >= rows:
            yield _together(waiting[:rows])
            waiting = waiting[rows:]
    if waiting:
        yield _together(waiting)
    if not found:
        raise CorpusError("the text holds no token of the chosen documents")


def _of_documents(
    batch: Batch, documents: Bool[Tensor, " documents"]
) -> tuple[Rows, Int64[Tensor, " chosen"]]:
    """The rows of a batch in which only tokens of chosen documents are kept, and which have any."""
    if int(batch.documents.max()) >= len(documents):
        raise CorpusError(
            "the text has more documents than were told chosen or not",
            got=len(documents),
            expected=f"more than {int(batch.documents.max())}",
        )
    kept = documents[batch.documents.clamp_min(0)] & (batch.documents >= 0) & batch.kept
    return {**joined([batch]), "kept": kept}, kept.any(1).nonzero()[:, 0]


def _together(batches: Sequence[Batch]) -> Batch:
    rows = joined(batches)
    (batch,) = batched(rows, torch.arange(len(rows["kept"])), len(rows["kept"]))
    return batch


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

    Raises:
        CorpusError: No token is of these documents, or there are more documents than are told of.
    """
    found = joined(rows_holding(batches, documents, rows))
    order = _in_turn(found)
    sizes = found["kept"].sum(1)[order]
    return batched(found, order[sizes.cumsum(0) - sizes < tokens].sort().values, rows)


def _in_turn(rows: Rows) -> Int64[Tensor, " rows"]:
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
