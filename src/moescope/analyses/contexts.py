"""The text of a capture as people read it: tokens, and what stands around one."""

from collections.abc import Callable, Iterable

import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from moescope.analyses.material import IN_MEMORY, Material
from moescope.captures.stream import TokenShard
from moescope.corpora.tokens import tokenizer_sha256
from moescope.errors import CaptureError, ModelError
from moescope.models.checkpoint import locate

_AROUND = 8
"""Tokens shown on each side of one."""

Reader = Callable[[Iterable[int]], str]
"""Token ids to text."""


def reader_of(material: Material) -> Reader:
    """The tokenizer the text was read with, without the weights beside it; or numbers."""
    tokenizer = _tokenizer(material)
    if tokenizer is None:
        return lambda ids: " ".join(map(str, ids))
    return lambda ids: str(tokenizer.decode(list(ids)))


def _tokenizer(material: Material) -> PreTrainedTokenizerBase | None:
    capture = material.capture
    wanted = capture.manifest["tokenizer_sha256"]
    if wanted is None:
        return None
    try:
        if capture.model_name == IN_MEMORY:
            found = material.model.tokenizer
        else:
            place = locate(capture.model_name, revision=capture.model_revision)
            found = AutoTokenizer.from_pretrained(
                place.folder, local_files_only=True, trust_remote_code=False
            )
    except (CaptureError, ModelError, OSError, ValueError):  # gone: numbers will have to do
        return None
    return found if tokenizer_sha256(found) == wanted else None


class Text:
    """The tokens of a shard, to be read."""

    def __init__(self, shard: TokenShard, read: Reader) -> None:
        self._ids, self._read = shard.token_ids.numpy(), read
        self._where = np.stack([shard.documents.numpy(), shard.rows.numpy()], 1)

    def around(self, position: int) -> str:
        """A token in brackets, with what stands around it in its document and row."""
        first = max(position - _AROUND, 0)
        window = slice(first, position + _AROUND + 1)
        same = (self._where[window] == self._where[position]).all(1)
        ids = self._ids[window]
        here = np.arange(first, first + len(ids)) - position
        parts = (ids[same & (here < 0)], ids[here == 0], ids[same & (here > 0)])
        return "{}[{}]{}".format(*(repr(self._read(part.tolist()))[1:-1] for part in parts))
