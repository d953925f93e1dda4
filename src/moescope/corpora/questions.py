"""Questions with one right answer each, as batches of tokens."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from moescope.corpora.documents import Document
from moescope.corpora.files import TextSource
from moescope.corpora.sources import Source, parse
from moescope.corpora.tokens import SpecialTokens, Tokenizer
from moescope.errors import CorpusError

BUILTIN = "banking77"
"""Name of the questions in the package."""
_BUILTIN = Path(__file__).parent / "builtin_questions" / f"{BUILTIN}.csv"
_SYNTAX = f"{BUILTIN}, a.csv:QUESTION:ANSWER, a.tsv:..., a.jsonl:... or hf:ID:CONFIG:SPLIT:..."
_ROWS, _ROWS_APART = 32, 128
NO_TARGET = -100
"""Stands where nothing is to be predicted."""

Ids = list[int]
Pair = tuple[str | Ids, str | Ids]
"""Question and answer, both as text or both as tokens."""


@dataclass(frozen=True, eq=False, kw_only=True)
class QuestionBatch:
    """Some questions, on the CPU; padding is always at the right."""

    input_ids: Int64[Tensor, "rows length"]
    """What the model reads: the question and its answer or, before a decoder of its own, the
    question alone."""
    attention_mask: Int64[Tensor, "rows length"]
    """1 at tokens, 0 at padding."""
    decoder_input_ids: Int64[Tensor, "rows steps"] | None
    """What the decoder of an encoder-decoder reads: its start token and the answer, but for the
    last token. None where the model has no decoder of its own."""
    targets: Int64[Tensor, "rows predicted"]
    """The token of the answer to be predicted at each position of what the (decoder of the) model
    reads; `NO_TARGET` elsewhere."""
    first: int
    """Number of the first question."""


class Questions:
    """Questions with one right answer each, in an order fixed by the seed.

    All are held in memory: they are some thousand short texts.

    Args:
        pairs: The questions with their answers.
        identity: What tells that the content is the same.
    """

    def __init__(self, pairs: Sequence[Pair], identity: dict[str, Any]) -> None:
        if not pairs:
            raise CorpusError("there are no questions")
        self.pairs = pairs
        self.identity = identity

    @classmethod
    def from_source(cls, spec: str, *, most: int | None = None, seed: int = 0) -> "Questions":
        """Read them from a file, the Hub or the package.

        Args:
            spec: `banking77`, or a source as in `moescope.corpora.sources` with two columns:
                `a.csv:question:answer`.
            most: So many of them, drawn at random; None for all. The order is always random.
            seed: Seed of the order.

        Raises:
            CorpusError: The syntax is unknown, a file or a column is missing, or holds no text.
        """
        question, answer = _columns(spec)
        pairs = [
            (_text(one), _text(other))
            for one, other in zip(question.documents(), answer.documents(), strict=True)
        ]
        order = np.random.default_rng(seed).permutation(len(pairs))[:most]
        identity = {"source": spec, **question.identity(), "most": most, "seed": seed}
        return cls([pairs[i] for i in order], identity)

    @classmethod
    def from_token_ids(cls, pairs: Sequence[tuple[Ids, Ids]]) -> "Questions":
        """Questions and answers that are tokens already, for models without a tokenizer."""
        return cls(pairs, {"source": "token ids"})

    def __len__(self) -> int:
        return len(self.pairs)

    def batches(
        self, tokenizer: Tokenizer | None, *, decoder_start: int | None, rows: int | None = None
    ) -> Iterator[QuestionBatch]:
        """Stream the questions.

        Without a decoder of its own a model reads `QUESTION ANSWER`, with the beginning token if
        the tokenizer uses one, and the answer has no end. An encoder reads the question as the
        tokenizer writes it; the answer ends with the tokenizer's end token.

        Args:
            tokenizer: None if all questions are token ids.
            decoder_start: First token that a decoder of its own is given; None without one.
            rows: Questions per batch; None for 32 or, for a decoder of its own, which says
                something at the tokens of the answer alone, 128.

        Raises:
            CorpusError: There is text but no tokenizer, or an answer holds no tokens.
        """
        special = SpecialTokens.of(tokenizer)
        encode = _apart if decoder_start is not None else _together
        size = rows or (_ROWS if decoder_start is None else _ROWS_APART)
        for first in range(0, len(self), size):
            some = self.pairs[first : first + size]
            encoded = [encode(pair, tokenizer) for pair in some]
            for tokens, pair in zip(encoded, some, strict=True):
                # An empty text may still be a space or an end token.
                if not (all(tokens) and all(map(_stripped, pair))):
                    raise CorpusError("a question or its answer holds no tokens", got=pair)
            if decoder_start is None:
                yield _joined(encoded, special, first)
            else:
                yield _separate(encoded, special, decoder_start, first)


def _columns(spec: str) -> tuple[Source, Source]:
    """The two columns of a source."""
    place, *columns = (f"{_BUILTIN}:question:answer" if spec == BUILTIN else spec).rsplit(":", 2)
    if len(columns) != 2 or not all((place, *columns)):
        raise CorpusError(f"cannot read the questions {spec!r}", expected=_SYNTAX)
    question, answer = (parse(f"{place}:{column}") for column in columns)
    if isinstance(question, TextSource):
        raise CorpusError(f"{spec} has no columns", expected=_SYNTAX)
    return question, answer


def _text(document: Document) -> str:
    if not isinstance(document.content, str):
        raise CorpusError(f"{document.name} holds a conversation", expected="text")
    return document.content


def _stripped(part: str | Ids) -> str | Ids:
    return part.strip() if isinstance(part, str) else part


def _together(pair: Pair, tokenizer: Tokenizer | None) -> tuple[Ids, Ids]:
    """Ids of a question and, after a space, of its answer.

    A word may begin with its space, so both are read in one. The answer begins with the first token
    that is not that of the question alone: where the end of the question is read otherwise before
    an answer, that token is to be predicted too.
    """
    question, answer = pair
    if not (isinstance(question, str) and isinstance(answer, str)):
        return _apart(pair, tokenizer)
    alone = _ids(question, tokenizer, special=False)
    both = _ids(f"{question} {answer}", tokenizer, special=False)
    equal = (one == other for one, other in zip(alone, both, strict=False))
    shared = sum(takewhile(bool, equal))
    return both[:shared], both[shared:]


def _apart(pair: Pair, tokenizer: Tokenizer | None) -> tuple[Ids, Ids]:
    """Ids of a question and of its answer, each as the tokenizer writes a whole text."""
    question, answer = (
        _ids(part, tokenizer, special=True) if isinstance(part, str) else list(part)
        for part in pair
    )
    return question, answer


def _ids(text: str, tokenizer: Tokenizer | None, *, special: bool) -> Ids:
    if tokenizer is None:
        raise CorpusError(
            "the questions are text, and the model came without a tokenizer",
            remedy="Load the model with `tokenizer=...`, or use Questions.from_token_ids",
        )
    return list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])


def _joined(
    encoded: Sequence[tuple[Ids, Ids]], special: SpecialTokens, first: int
) -> QuestionBatch:
    """For a model without a decoder of its own."""
    begin = [] if special.begin is None else [special.begin]
    whole = [[*begin, *question, *answer] for question, answer in encoded]
    silent = [len(begin) + len(question) - 1 for question, _ in encoded]
    targets = [
        [NO_TARGET] * before + answer + [NO_TARGET]
        for before, (_, answer) in zip(silent, encoded, strict=True)
    ]
    return QuestionBatch(
        input_ids=_padded(whole, special.padding),
        attention_mask=_padded([[1] * len(ids) for ids in whole], 0),
        decoder_input_ids=None,
        targets=_padded(targets, NO_TARGET),
        first=first,
    )


def _separate(
    encoded: Sequence[tuple[Ids, Ids]], special: SpecialTokens, start: int, first: int
) -> QuestionBatch:
    """For an encoder and a decoder."""
    return QuestionBatch(
        input_ids=_padded([question for question, _ in encoded], special.padding),
        attention_mask=_padded([[1] * len(question) for question, _ in encoded], 0),
        decoder_input_ids=_padded(
            [[start, *answer[:-1]] for _, answer in encoded], special.padding
        ),
        targets=_padded([answer for _, answer in encoded], NO_TARGET),
        first=first,
    )


def _padded(rows: Sequence[Ids], padding: int) -> Int64[Tensor, "rows longest"]:
    return pad_sequence(
        [torch.tensor(row) for row in rows], batch_first=True, padding_value=padding
    )
