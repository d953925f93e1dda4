"""Documents to token ids, in pieces, so that a document may be larger than memory."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from moescope.corpora.documents import Chat, Document, TextFile, TokenIds
from moescope.corpora.files import read_text
from moescope.errors import CorpusError

PIECE_CHARACTERS = 1 << 16
"""A longer text is cut before a space or line end about every 64 Ki characters, and the pieces
are tokenised one by one."""

Tokenizer = PreTrainedTokenizerBase


@dataclass(frozen=True)
class SpecialTokens:
    """Tokens that packing itself puts into rows."""

    begin: int | None
    """First token of every row, where the tokenizer begins a text with one."""
    end: int | None
    """Stands between two documents of a row."""
    padding: int
    """Fills rows that are not full; attention never sees it."""

    @classmethod
    def of(cls, tokenizer: Tokenizer | None) -> "SpecialTokens":
        """Read them from a tokenizer; without one there are none, and padding is 0."""
        if tokenizer is None:
            return cls(None, None, 0)
        end, begin = tokenizer.eos_token_id, tokenizer.bos_token_id
        # Many tokenizers know a beginning token but do not use it.
        used = tokenizer("a", add_special_tokens=True)["input_ids"][:1]
        padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else end
        return cls(begin if used == [begin] else None, end, padding or 0)


def tokenize(document: Document, tokenizer: Tokenizer | None) -> Iterator[Int64[np.ndarray, "_"]]:
    """Stream the token ids of a document, without special tokens around them.

    Raises:
        CorpusError: There is text but no tokenizer, or a conversation but no chat template.
    """
    if isinstance(document.content, TokenIds):
        yield np.asarray(document.content.ids, dtype=np.int64)
        return
    if tokenizer is None:
        raise CorpusError(
            f"document {document.name!r} is text, and the model came without a tokenizer",
            remedy="Load the model with `tokenizer=...`, or use Corpus.from_token_ids",
        )
    match document.content:
        case Chat():
            yield _chat(document, document.content, tokenizer)
        case TextFile(path):
            yield from _pieces(read_text(path), tokenizer)
        case str(text):
            yield from _pieces([text], tokenizer)


def _pieces(texts: Iterable[str], tokenizer: Tokenizer) -> Iterator[Int64[np.ndarray, "_"]]:
    for piece in _cut(texts):
        encoded = tokenizer(piece, add_special_tokens=False, verbose=False)
        yield np.asarray(encoded["input_ids"], dtype=np.int64)


def _cut(texts: Iterable[str]) -> Iterator[str]:
    """Join and cut again into pieces of at most `PIECE_CHARACTERS`."""
    rest = ""
    for text in texts:
        rest += text
        start = 0
        while len(rest) - start > PIECE_CHARACTERS:
            stop = start + PIECE_CHARACTERS
            # Before the space: byte-level tokenizers join a space to the word after it.
            space = max(rest.rfind(" ", start + 1, stop), rest.rfind("\n", start + 1, stop))
            stop = space if space > start else stop
            yield rest[start:stop]
            start = stop
        rest = rest[start:]
    if rest:
        yield rest


def _chat(document: Document, chat: Chat, tokenizer: Tokenizer) -> Int64[np.ndarray, "_"]:
    if not tokenizer.chat_template:
        raise CorpusError(
            f"document {document.name!r} is a conversation, and the tokenizer has no chat template",
            remedy="Name a field that holds plain text, or use a chat model's tokenizer",
        )
    messages = [dict(message) for message in chat.messages]
    try:
        ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    except Exception as error:  # templates are programs; theirs are jinja2's errors and any other
        raise CorpusError(
            f"the chat template refuses document {document.name!r}",
            got=error,
            remedy="Check the roles and their order",
        ) from error
    return np.asarray(ids, dtype=np.int64)


def tokenizer_sha256(tokenizer: Tokenizer | None) -> str | None:
    """Hash everything that decides how text becomes tokens; None without a tokenizer."""
    if tokenizer is None:
        return None
    content: dict[str, object] = {
        "class": type(tokenizer).__name__,
        "vocabulary": sorted(tokenizer.get_vocab().items()),
        "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "chat_template": tokenizer.chat_template,
    }
    if tokenizer.is_fast:
        backend = json.loads(tokenizer.backend_tokenizer.to_str())
        # What the last call asked for, not what the tokenizer is.
        backend.pop("truncation", None)
        backend.pop("padding", None)
        content["backend"] = backend
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
