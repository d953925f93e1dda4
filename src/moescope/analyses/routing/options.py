"""Options of the analysis `routing`."""

from dataclasses import dataclass

from moescope.errors import require_least


@dataclass(frozen=True, kw_only=True)
class RoutingOptions:
    """Options of `routing`."""

    permutations: int = 1_000
    """Shuffles of the documents' domain labels in the null of the divergence."""
    bootstrap: int = 1_000
    """Resamples of documents behind each 95% interval of a share."""
    seed: int = 0
    """Seed of shuffles, resamples and samples."""
    documents: int = 1_000
    """Documents of each domain whose counts are kept apart, for intervals of shares and for
    shuffles; of more, so many at random. All tokens enter the shares themselves."""
    sample: int = 200
    """Tokens of each domain, at random, whose router logits are compared."""
    typical_tokens: int = 5
    """Tokens of the vocabulary that are named as typical for an expert, at most."""
    least_count: int = 20
    """Times that such a token comes at least."""

    def __post_init__(self) -> None:
        lowest = {"documents": 1, "sample": 2, "typical_tokens": 0, "least_count": 1}
        require_least(self, lowest)
