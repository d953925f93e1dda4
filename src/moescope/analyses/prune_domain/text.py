"""The text in two halves: on each, experts are chosen for the other."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from moescope.corpora.corpus import Corpus
from moescope.corpora.packing import Batch
from moescope.corpora.rows import batched, joined
from moescope.corpora.tokens import Tokenizer
from moescope.errors import CorpusError
from moescope.progress import track


def halves(corpus: Corpus, tokenizer: Tokenizer | None, seed: int) -> list[list[Batch]]:
    """Two halves of each domain's documents, as batches in which they share no row.

    A half is a run of documents in the order of the corpus, as of a ring, so that only rows where
    the halves touch hold both; these are left out. So no state of one half ever depends on a
    document of the other.

    Args:
        corpus: The text, read once and held.
        tokenizer: As in `Corpus.batches`.
        seed: Of where in each domain the first half begins.

    Raises:
        CorpusError: The text cannot be read, or a domain cannot be split.
    """
    rows = joined(track(corpus.batches(tokenizer), "prune-domain: reading"))
    text = rows["documents"] >= 0
    second = _second_half(rows["documents"][text], rows["domains"][text], corpus.domains, seed)
    in_second = second[rows["documents"].clamp_min(0)]
    holds = [(text & ~in_second).any(1), (text & in_second).any(1)]
    split = []
    for half in range(2):
        own = holds[half] & ~holds[1 - half]
        _require_domains(rows["domains"][own][rows["kept"][own]], corpus.domains)
        split.append(batched(rows, own.nonzero()[:, 0], corpus.packing.rows))
    return split


def _second_half(
    documents: Int64[Tensor, " tokens"],
    domains: Int64[Tensor, " tokens"],
    names: Sequence[str],
    seed: int,
) -> Bool[Tensor, " documents"]:
    """Which documents belong to the second half."""
    second = torch.zeros(int(documents.max()) + 1, dtype=torch.bool)
    random = np.random.default_rng(seed)
    for number, name in enumerate(names):
        own = torch.unique(documents[domains == number])
        if len(own) < 2:
            raise _too_few(name, f"{len(own)} documents")
        ring = own.roll(int(random.integers(len(own))))
        second[ring[len(own) // 2 :]] = True
    return second


def _require_domains(domains: Int64[Tensor, " tokens"], names: Sequence[str]) -> None:
    for number, name in enumerate(names):
        if not (domains == number).any():
            raise _too_few(name, "documents that share all their rows")


def _too_few(name: str, got: str) -> CorpusError:
    return CorpusError(
        f"the documents of domain {name!r} cannot be split in two halves, one to choose experts "
        "on and one to measure the loss on",
        got=got,
        expected="at least 2 documents, with rows of their own",
        remedy="Give it more documents, raise tokens, or leave the domain out of the corpus",
    )
