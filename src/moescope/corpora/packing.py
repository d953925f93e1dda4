"""Documents into rows of equal length, and rows of several domains into batches."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from moescope.errors import OptionError, require_least

Span = tuple[int, Int64[np.ndarray, "_"]]
"""Consecutive tokens of one document: its running number and the token ids. No tokens mean that
the document has ended."""


@dataclass(frozen=True, kw_only=True)
class Packing:
    """How documents become rows of tokens."""

    length: int = 256
    """Tokens per row."""
    rows: int = 8
    """Rows per batch."""
    packed: bool = True
    """Join the documents of a domain, with the tokenizer's end token between them; otherwise
    every document begins a row. A document that does not fit goes on in the next row."""
    skip_first: bool = True
    """Leave the first position of every row out of all measures: it attends to nothing but
    itself, and many models use it as an attention sink."""
    keep_padding: bool = False
    """Treat the padding of every row as text of its document: it is recorded, counted in every
    measure and sampled, though attention does not see it. A mistake of published studies, to be
    repeated on purpose; only where documents are not packed."""
    max_tokens: int | None = None
    """Stop after the row that completes this many tokens of text; None reads all."""
    shuffle: int = 1_000
    """Documents held in the shuffling buffer of each domain; 0 keeps the order of the source."""
    seed: int = 0
    """Seed of the shuffling."""

    def __post_init__(self) -> None:
        lowest = {"length": 2, "rows": 1, "shuffle": 0, "max_tokens": 1}
        require_least(self, lowest)
        if self.keep_padding and self.packed:
            raise OptionError(
                "keep_padding goes with rows of one document: joined rows have no padding to keep",
                remedy="Set packed to false too",
            )


@dataclass(frozen=True, eq=False, kw_only=True)
class Batch:
    """Some rows of a corpus, on the CPU. Every row holds tokens of one domain."""

    input_ids: Int64[Tensor, "rows length"]
    """Vocabulary indices."""
    attention_mask: Int64[Tensor, "rows length"]
    """1 at tokens, 0 at padding, which is always at the right."""
    kept: Bool[Tensor, "rows length"]
    """Positions that enter measures: no padding and no first positions unless asked for."""
    documents: Int64[Tensor, "rows length"]
    """Running number of the document over the whole corpus, -1 at padding that is not kept."""
    domains: Int64[Tensor, "rows length"]
    """Index into the domains of the corpus, -1 at padding that is not kept."""
    first_row: int
    """Number of the first row within the corpus."""
    document_names: Mapping[int, str]
    """Names of the documents that begin in this batch, by number, in ascending order."""


@dataclass(frozen=True)
class Row:
    """One row before padding."""

    domain: int
    """Index of the domain."""
    ids: Int64[np.ndarray, "tokens"]
    """At most `length` tokens."""
    documents: Int64[np.ndarray, "tokens"]
    """Document of each token."""


def fill_rows(
    spans: Iterator[Span], domain: int, packing: Packing, begin: int | None
) -> Iterator[Row]:
    """Cut a stream of spans into rows without losing a token.

    Args:
        spans: Tokens in order; a document's spans follow one another, an empty one ends it.
        domain: Index of the domain, to be noted in the rows.
        packing: Row length, and whether a row may hold several documents.
        begin: Token to be put before the others in every row that does not begin with it.
    """
    row = list[Span]()
    free = packing.length
    for document, ids in spans:
        if row and not packing.packed and not len(ids):
            yield _row(domain, row)
            row, free = [], packing.length
        while len(ids):
            if not row and begin is not None and ids[0] != begin:
                row.append((document, np.array([begin])))
                free -= 1
            row.append((document, ids[:free]))
            ids, free = ids[free:], free - len(ids[:free])
            if not free:
                yield _row(domain, row)
                row, free = [], packing.length
    if row:
        yield _row(domain, row)


def _row(domain: int, spans: Sequence[Span]) -> Row:
    documents = [np.full(len(ids), document, dtype=np.int64) for document, ids in spans]
    return Row(domain, np.concatenate([ids for _, ids in spans]), np.concatenate(documents))


def round_robin(streams: Sequence[Iterator[Row]]) -> Iterator[Row]:
    """Take one row from each stream in turn; a stream that ends drops out."""
    alive = list(streams)
    while alive:
        for stream in list(alive):
            row = next(stream, None)
            if row is None:
                alive.remove(stream)
            else:
                yield row


def collate(
    rows: Sequence[Row],
    first_row: int,
    names: Mapping[int, str],
    packing: Packing,
    padding: int,
) -> Batch:
    """Pad rows to one length and set the masks.

    Kept padding belongs to the document and the domain of its row.
    """
    shape = (len(rows), packing.length)
    input_ids = torch.full(shape, padding, dtype=torch.int64)
    attention_mask = torch.zeros(shape, dtype=torch.int64)
    documents = torch.full(shape, -1, dtype=torch.int64)
    domains = torch.full(shape, -1, dtype=torch.int64)
    for number, row in enumerate(rows):
        size = len(row.ids)
        input_ids[number, :size] = torch.from_numpy(row.ids)
        attention_mask[number, :size] = 1
        if packing.keep_padding:
            documents[number], domains[number] = int(row.documents[-1]), row.domain
        documents[number, :size] = torch.from_numpy(row.documents)
        domains[number, :size] = row.domain
    kept = documents >= 0
    if packing.skip_first:
        kept[:, 0] = False
    return Batch(
        input_ids=input_ids,
        attention_mask=attention_mask,
        kept=kept,
        documents=documents,
        domains=domains,
        first_row=first_row,
        document_names=names,
    )
