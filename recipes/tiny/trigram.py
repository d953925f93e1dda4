"""A pooled interpolated trigram model: what `tiny` must beat to be called a language model."""

import math
from collections import Counter

Tokens = list[int]
ROUNDS = 10  # of expectation maximisation for the interpolation weights


class Trigram:
    """p(c | a, b) = w3 c(abc)/c(ab) + w2 c(bc)/c(b) + w1 c(c)/N + w0/V (Jelinek and Mercer 1980).

    The four weights are fitted by expectation maximisation on documents kept out of the counts.
    """

    def __init__(self, documents: list[Tokens], tuning: list[Tokens], vocabulary: int) -> None:
        self.vocabulary = vocabulary
        self.counts: tuple[Counter, ...] = (Counter(), Counter(), Counter())
        for tokens in documents:
            for n in (1, 2, 3):
                self.counts[n - 1].update(zip(*(tokens[i:] for i in range(n)), strict=False))
        self.total = self.counts[0].total()
        self.weights = [0.25] * 4
        for _ in range(ROUNDS):
            responsibility = [0.0] * 4
            for parts in (p for tokens in tuning for p in self.parts(tokens)):
                mixed = [w * p for w, p in zip(self.weights, parts, strict=True)]
                for i, value in enumerate(mixed):
                    responsibility[i] += value / sum(mixed)
            self.weights = [r / sum(responsibility) for r in responsibility]

    def parts(self, tokens: Tokens) -> list[tuple[float, float, float, float]]:
        """Uniform, unigram, bigram, trigram probability of every token but the first."""
        unigram, bigram, trigram = self.counts
        found = []
        for i in range(1, len(tokens)):
            c, b = tokens[i], tokens[i - 1]
            a = tokens[i - 2] if i > 1 else None
            two = bigram[b, c] / unigram[b,] if unigram[b,] else 0.0
            three = trigram[a, b, c] / bigram[a, b] if bigram[a, b] else 0.0
            found.append((1 / self.vocabulary, unigram[c,] / self.total, two, three))
        return found

    def losses(self, tokens: Tokens) -> list[float]:
        """Negative log-likelihood in nats of every token but the first."""
        return [
            -math.log(sum(w * p for w, p in zip(self.weights, parts, strict=True)))
            for parts in self.parts(tokens)
        ]
