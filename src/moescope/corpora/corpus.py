"""A corpus: documents of several domains, given out as batches of tokens."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import count
from typing import Any

import numpy as np

from moescope.corpora.documents import Document, TokenIds, shuffled
from moescope.corpora.packing import Batch, Packing, Row, Span, collate, fill_rows, round_robin
from moescope.corpora.sources import BUILTIN_DOMAINS, Source, parse
from moescope.corpora.tokens import SpecialTokens, Tokenizer, tokenize
from moescope.errors import CorpusError

RESERVED_DOMAIN = "all"
"""In tables: every domain together."""
_DEFAULT = Packing()


class Corpus:
    """Documents of named domains, streamed as token batches in an order fixed by the seed.

    Within a domain documents pass through a bounded shuffling buffer (`Packing.shuffle`). Rows of
    the domains alternate, so that any beginning of the corpus is balanced until the shortest
    domain ends; the others then go on. No file is read whole and nothing is kept between two
    calls of `batches`, which always gives the same batches.
    """

    def __init__(self, sources: Mapping[str, Source], packing: Packing = _DEFAULT) -> None:
        if not sources:
            raise CorpusError("a corpus needs at least one domain")
        if RESERVED_DOMAIN in sources:
            raise CorpusError(
                f"no domain may be called {RESERVED_DOMAIN!r}: tables use it for all together",
                remedy="Give it another name",
            )
        self._sources = dict(sources)
        self.packing = packing

    @classmethod
    def from_sources(cls, sources: Mapping[str, str], packing: Packing = _DEFAULT) -> "Corpus":
        """Name files and data sets by domain.

        Args:
            sources: Domain to source, such as `{"wiki": "a.txt", "maths":
                "hf:openai/gsm8k:main:train:question"}`; `moescope.corpora.sources` lists the forms.
            packing: How documents become rows.

        Raises:
            CorpusError: The syntax of a source is unknown, or a file is missing.
        """
        return cls({domain: parse(spec) for domain, spec in sources.items()}, packing)

    @classmethod
    def builtin(cls, packing: Packing = _DEFAULT) -> "Corpus":
        """The corpus in the package: encyclopedia, maths, code and French, 281 documents."""
        return cls.from_sources({name: f"builtin:{name}" for name in BUILTIN_DOMAINS}, packing)

    @classmethod
    def from_token_ids(
        cls, documents: Mapping[str, Sequence[Sequence[int]]], packing: Packing = _DEFAULT
    ) -> "Corpus":
        """Documents that are tokens already, one list each, for models without a tokenizer."""
        sources: dict[str, Source] = {}
        for domain, given in documents.items():
            sources[domain] = _GivenIds("token ids", domain, given)
        return cls(sources, packing)

    def limited(self, tokens: int) -> "Corpus":
        """The same text up to so many tokens, or to where it ended before."""
        most = min(tokens, self.packing.max_tokens or tokens)
        return Corpus(self._sources, replace(self.packing, max_tokens=most))

    @property
    def domains(self) -> list[str]:
        """Names of the domains, in their order."""
        return list(self._sources)

    @property
    def description(self) -> dict[str, Any]:
        """Sources with what identifies their content, and packing, as JSON can hold them.

        Reads every local file once, to hash it.

        Raises:
            CorpusError: A file cannot be read.
        """
        sources = {
            domain: {"source": source.spec, **source.identity()}
            for domain, source in self._sources.items()
        }
        return {"sources": sources, "packing": asdict(self.packing)}

    def batches(self, tokenizer: Tokenizer | None, *, start_row: int = 0) -> Iterator[Batch]:
        """Stream the corpus.

        Args:
            tokenizer: None if all documents are token ids.
            start_row: Leave out that many rows at the beginning. They are read, but not given out.

        Raises:
            CorpusError: A source cannot be read, or a domain holds no tokens.
        """
        special = SpecialTokens.of(tokenizer)
        names: dict[int, str] = {}
        waiting = list[Row]()
        tokens, first = 0, start_row
        for number, row in enumerate(self._rows(tokenizer, special, names)):
            tokens += len(row.ids)
            if number < start_row:
                names.clear()
                continue
            waiting.append(row)
            enough = self.packing.max_tokens is not None and tokens >= self.packing.max_tokens
            if len(waiting) == self.packing.rows or enough:
                yield collate(waiting, first, dict(names), self.packing, special.padding)
                first += len(waiting)
                waiting = []
                names.clear()
            if enough:
                return
        if waiting:
            yield collate(waiting, first, dict(names), self.packing, special.padding)

    def _rows(
        self, tokenizer: Tokenizer | None, special: SpecialTokens, names: dict[int, str]
    ) -> Iterator[Row]:
        """Rows of all domains in turn; `names` gains each document with its first token."""
        numbers = count()
        streams = []
        for index, (domain, source) in enumerate(self._sources.items()):
            separator = special.end if self.packing.packed else None
            documents = self._documents(domain, source)
            spans = _spans(documents, tokenizer, separator, numbers, names)
            spans = _not_empty(spans, domain, source.spec)
            streams.append(fill_rows(spans, index, self.packing, special.begin))
        return round_robin(streams)

    def _documents(self, domain: str, source: Source) -> Iterator[Document]:
        key = f"{self.packing.seed}:{domain}"
        return shuffled(source.documents(), buffer=self.packing.shuffle, key=key)

    def __repr__(self) -> str:
        sources = ", ".join(f"{name}={source.spec!r}" for name, source in self._sources.items())
        return f"Corpus({sources})"


@dataclass(frozen=True)
class _GivenIds:
    spec: str
    domain: str
    given: Sequence[Sequence[int]]

    def identity(self) -> dict[str, str]:
        ids = json.dumps([list(map(int, ids)) for ids in self.given])
        return {"sha256": hashlib.sha256(ids.encode()).hexdigest()}

    def documents(self) -> Iterator[Document]:
        for number, ids in enumerate(self.given):
            yield Document(f"{self.domain}:{number}", TokenIds(ids))


def _spans(
    documents: Iterator[Document],
    tokenizer: Tokenizer | None,
    separator: int | None,
    numbers: Iterator[int],
    names: dict[int, str],
) -> Iterator[Span]:
    """Tokens of all documents of a domain that have any, with the separator between them.

    The separator belongs to the document before it. A document gets its number when its first
    token is asked for, so numbers rise in the order in which documents appear in rows.
    """
    before: int | None = None
    for document in documents:
        pieces = (ids for ids in tokenize(document, tokenizer) if len(ids))
        ids = next(pieces, None)
        if ids is None:
            continue
        if before is not None and separator is not None:
            yield before, np.array([separator])
        before = next(numbers)
        names[before] = document.name
        yield before, ids
        for ids in pieces:
            yield before, ids
        yield before, ids[:0]


def _not_empty(spans: Iterator[Span], domain: str, spec: str) -> Iterator[Span]:
    empty = True
    for span in spans:
        empty = False
        yield span
    if empty:
        raise CorpusError(
            f"domain {domain!r} is empty: {spec} holds no tokens",
            remedy="Name a source with text, or leave the domain out",
        )
