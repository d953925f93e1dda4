"""A first look at the tokens of a capture: what there is to count, before any routing is read."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int
from numpy import ndarray as Array

from moescope.captures.read import Capture
from moescope.measures.jackknife import GROUPS


@dataclass(frozen=True, kw_only=True)
class Survey:
    """Documents, vocabulary and a sample of a capture; grows with its documents alone."""

    domain_of: Int[Array, " documents"]
    """Index into the domains of every document; -1 for one without kept tokens."""
    tokens: Int[Array, " documents"]
    """Tokens of every document."""
    group_of: Int[Array, " documents"]
    """Group of every document, for the jackknife; every domain is spread over all groups."""
    place_of: Int[Array, " documents"]
    """Row of every document among `kept`; one past the last for all others."""
    kept: Int[Array, " kept"]
    """The documents whose counts are kept apart."""
    vocabulary: Int[Array, " vocabulary"]
    """Tokens by their vocabulary index."""
    sample: Int[Array, " sampled"]
    """Tokens at random, as many of each domain, ascending."""
    sample_documents: Int[Array, " sampled"]
    """Their documents."""

    def within(self, domain: int) -> Bool[Array, " documents"]:
        """Which documents with tokens belong to a domain; to any for -1."""
        return np.asarray((self.tokens > 0) & ((domain < 0) | (self.domain_of == domain)))


def survey(capture: Capture, *, documents: int, sample: int, seed: int) -> Survey:
    """Read where every token stands, one shard at a time.

    Args:
        capture: The capture.
        documents: Most documents of a domain whose counts are kept apart; of more, at random.
        sample: Tokens of each domain in the sample.
        seed: Seed of both choices.
    """
    random = np.random.default_rng(seed)
    count = int(capture.manifest["num_documents"])
    domain_of, tokens = np.full(count, -1), np.zeros(count, dtype=np.int64)
    vocabulary = np.zeros(0, dtype=np.int64)
    lowest = [_Lowest(sample) for _ in capture.domains]
    for shard in capture.token_shards():
        here, domains = shard.documents.numpy(), shard.domain_of.numpy()
        domain_of[here] = domains
        np.add.at(tokens, here, 1)
        found = np.bincount(shard.token_ids.numpy(), minlength=len(vocabulary))
        found[: len(vocabulary)] += vocabulary
        vocabulary = found
        numbers = random.random(len(shard))
        for domain, reservoir in enumerate(lowest):
            inside = np.flatnonzero(domains == domain)
            reservoir.offer(numbers[inside], inside + shard.tokens.start, here[inside])
    chosen = np.concatenate([reservoir.entries for reservoir in lowest])
    chosen = chosen[chosen[:, 0].argsort()]
    drawn = _rank_within(domain_of, random.permutation(count)) < documents
    keep = drawn & (domain_of >= 0)
    return Survey(
        domain_of=domain_of,
        tokens=tokens,
        group_of=_turn(domain_of) % GROUPS,
        place_of=np.where(keep, np.cumsum(keep) - 1, keep.sum()),
        kept=np.flatnonzero(keep),
        vocabulary=vocabulary,
        sample=chosen[:, 0],
        sample_documents=chosen[:, 1],
    )


class _Lowest:
    """Tokens with the lowest random numbers so far, and their documents."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._numbers = np.zeros(0)
        self.entries = np.zeros((0, 2), dtype=np.int64)

    def offer(self, numbers: Array, tokens: Array, documents: Array) -> None:
        numbers = np.concatenate([self._numbers, numbers])
        entries = np.concatenate([self.entries, np.stack([tokens, documents], 1)])
        best = numbers.argsort(kind="stable")[: self._size]
        self._numbers, self.entries = numbers[best], entries[best]


def _turn(domain_of: Int[Array, " documents"]) -> Int[Array, " documents"]:
    """Place of every document if they stood domain by domain."""
    turn = np.empty_like(domain_of)
    turn[np.argsort(domain_of, kind="stable")] = np.arange(len(domain_of))
    return turn


def _rank_within(
    domain_of: Int[Array, " documents"], order: Int[Array, " documents"]
) -> Int[Array, " documents"]:
    """How many documents of the same domain come before each one in an order."""
    rank = np.zeros(len(domain_of), dtype=np.int64)
    for domain in np.unique(domain_of):
        inside = order[domain_of[order] == domain]
        rank[inside] = np.arange(len(inside))
    return rank
