"""Documents as a source gives them, before they are tokens."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

SHUFFLE_CHARACTERS = 1 << 26
"""The shuffling buffer never holds more text than this (64 Mi characters), however long the
documents are."""


@dataclass(frozen=True)
class TextFile:
    """A file that is one document; it is read in pieces, when its turn comes."""

    path: Path
    """UTF-8 text."""


@dataclass(frozen=True)
class Chat:
    """A conversation, to be written out by the tokenizer's chat template."""

    messages: Sequence[Mapping[str, str]]
    """One mapping with `role` and `content` per turn."""


@dataclass(frozen=True)
class TokenIds:
    """A document that is tokens already."""

    ids: Sequence[int]
    """Vocabulary indices."""


@dataclass(frozen=True)
class Document:
    """One document of a source: what it is called and what it holds."""

    name: str
    """The row's own `id` where it has one, else file name and line, or row number."""
    content: str | TextFile | Chat | TokenIds
    """The text, where to read it, or what stands for it."""

    @property
    def characters(self) -> int:
        """Characters (or tokens) that this object itself holds in memory."""
        match self.content:
            case str(text):
                return len(text)
            case Chat(messages):
                return sum(len(str(message.get("content"))) for message in messages)
            case TokenIds(ids):
                return len(ids)
            case TextFile():
                return 0


def shuffled(documents: Iterable[Document], *, buffer: int, key: str) -> Iterator[Document]:
    """Change the order of a stream with a bounded buffer.

    Up to `buffer` documents (and `SHUFFLE_CHARACTERS` of text) are held; whenever there is one
    more, a random one of them goes out. A source that fits in the buffer is shuffled fully; a
    buffer of 0 keeps the order.

    Args:
        documents: The stream.
        buffer: Documents held.
        key: Seeds the order; the same key gives the same order on every machine.
    """
    random, held, characters = Random(key), list[Document](), 0  # noqa: S311
    for document in documents:
        held.append(document)
        characters += document.characters
        while held and (len(held) > buffer or characters > SHUFFLE_CHARACTERS):
            position = random.randrange(len(held))
            held[position], held[-1] = held[-1], held[position]
            out = held.pop()
            characters -= out.characters
            yield out
    random.shuffle(held)
    yield from held
