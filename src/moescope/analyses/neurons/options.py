"""What can be set about `neurons`."""

from dataclasses import dataclass

from moescope.errors import require_least


@dataclass(frozen=True, kw_only=True)
class NeuronsOptions:
    """Options of `neurons`."""

    threshold: float = 0.001
    """A neuron is active where the absolute value of its activation is above it."""
    permutations: int = 1_000
    """Shuffles of the documents behind each p-value."""
    show: int = 5
    """Most selective neurons of each layer that are shown one by one, with their tokens."""
    group: int = 16
    """Neurons that are ablated together: the most selective of a domain."""
    tokens: int = 100_000
    """Most tokens of text for the ablations, from the beginning of the corpus, which is balanced
    by domain; half of its documents count, the others are those that neurons are chosen on. 0
    leaves the ablations out."""
    bootstrap: int = 1_000
    """Resamples of documents behind each 95% interval."""
    seed: int = 0
    """Seed of shuffles, resamples and random controls."""

    def __post_init__(self) -> None:
        lowest = {"threshold": 0, "permutations": 1, "show": 0, "group": 1, "tokens": 0}
        require_least(self, lowest)
