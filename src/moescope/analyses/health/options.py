"""Options of the analysis `health`."""

from dataclasses import dataclass

from moescope.errors import require_least


@dataclass(frozen=True, kw_only=True)
class HealthOptions:
    """Options of `health`."""

    permutations: int = 1_000
    """Shuffles or swaps of documents in each null."""
    shifts: int = 20
    """Times that the experts of every passage are moved along it, against which what a token says
    about its experts is held; at least 19 for p <= 0.05."""
    bootstrap: int = 1_000
    """Resamples of documents behind each 95% interval."""
    seed: int = 0
    """Seed of all of these."""
    documents: int = 1_000
    """Documents of each domain that intervals and tests rest on; of more, so many at random."""
    document: int | None = None
    """Number of the document whose experts are shown along the text; None for the first that is
    long enough."""
    shown_tokens: int = 120
    """Tokens of it that are shown, at most."""

    def __post_init__(self) -> None:
        lowest = {"permutations": 19, "shifts": 19, "documents": 1, "shown_tokens": 2}
        require_least(self, lowest)
