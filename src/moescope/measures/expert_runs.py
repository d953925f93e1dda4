"""How long an expert stays along a text, and how often the experts of neighbours change."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray as Array


@dataclass(frozen=True)
class Passages:
    """Where stretches of text begin: neighbours are tokens that follow each other in one."""

    starts: Int[Array, " passages"]
    """First token of each passage."""
    lengths: Int[Array, " passages"]
    """Its tokens, one after the other."""

    @classmethod
    def of(cls, *labels: Int[Array, " tokens"]) -> "Passages":
        """Passages of tokens in their order: within one, no label, such as a document, changes."""
        tokens = len(labels[0])
        begins = np.zeros(tokens, dtype=bool)
        begins[:1] = True
        for label in labels:
            begins[1:] |= label[1:] != label[:-1]
        starts = np.flatnonzero(begins)
        return cls(starts, np.diff(starts, append=tokens))

    @property
    def of_token(self) -> Int[Array, " tokens"]:
        """Passage of every token."""
        return np.repeat(np.arange(len(self.starts)), self.lengths)

    def shifted(self, random: np.random.Generator) -> Int[Array, " tokens"]:
        """A token for every token: passages turned in a circle, each by a random number of tokens.

        Runs stay what they are, but for one break in each passage.
        """
        turns = random.integers(0, self.lengths)
        starts, lengths = self.starts[self.of_token], self.lengths[self.of_token]
        positions = np.arange(len(starts)) - starts
        return np.asarray(starts + (positions + turns[self.of_token]) % lengths)


def used_by(
    experts: Int[Array, "tokens top_k"], num_experts: int
) -> Bool[Array, "tokens num_experts"]:
    """Which experts each token has; -1 is an unused slot."""
    used = np.zeros((len(experts), num_experts + 1), dtype=bool)  # -1 is the last
    used[np.arange(len(experts))[:, None], experts] = True
    return used[:, :-1]


@dataclass(frozen=True)
class Stays:
    """Tokens of each expert in each passage, and how often it stays from one to the next."""

    tokens: Int[Array, "passages experts"]
    """Tokens that have the expert."""
    stayed: Int[Array, "passages experts"]
    """Of these, those whose next token has it too. Tokens less these are its runs."""
    shuffled: Float[Array, "passages experts"]
    """What `stayed` is on average when the tokens of the passage are shuffled."""


def stays(used: Bool[Array, "tokens experts"], passages: Passages) -> Stays:
    """Count along the text.

    With m of n tokens in random order, an expert stays m (m - 1) / n times, so that there are
    m (n - m + 1) / n runs (Wald and Wolfowitz 1940): exact, whatever the passages are about.
    """
    both = used[:-1] & used[1:]
    both = np.concatenate([both, np.zeros_like(used[:1])])
    both[passages.starts[1:] - 1] = False
    tokens = np.add.reduceat(used, passages.starts, axis=0, dtype=np.int64)
    stayed = np.add.reduceat(both, passages.starts, axis=0, dtype=np.int64)
    return Stays(tokens, stayed, tokens * (tokens - 1) / passages.lengths[:, None])


def mean_run(
    tokens: Int[Array, "*shape"], stayed: Float[Array, "*shape"] | Int[Array, "*shape"]
) -> Float[Array, "*shape"]:
    """Tokens per run; NaN where there are none."""
    runs = tokens - stayed
    length = np.full(tokens.shape, np.nan)
    return np.asarray(np.divide(tokens, runs, out=length, where=runs > 0))


def geometric_run(share: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Mean run of an expert that each token has with the same probability: `1 / (1 - share)`."""
    with np.errstate(divide="ignore"):  # an expert of all tokens has one endless run
        return np.asarray(1 / (1 - share))
