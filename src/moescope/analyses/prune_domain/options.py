"""What can be set about `prune-domain`, and what is tried."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from moescope.config import IntList
from moescope.errors import OptionError, require_least

Criterion = Literal["frequency", "reap"]
Choice = Literal["unpruned", "domain", "pooled", "random"]


@dataclass(frozen=True, kw_only=True)
class PruneDomainOptions:
    """Options of `prune-domain`."""

    domains: tuple[str, ...] = ()
    """Domains to choose experts for; all if left out. Losses are measured on all in any case."""
    shares: tuple[float, ...] = (0.5, 0.7, 0.9)
    """Sizes: the fewest experts per layer, the same number everywhere, that can cover this share of
    the routing of each of these domains in every layer."""
    counts: IntList = ()
    """Sizes in the place of `shares`: experts that every layer keeps."""
    criterion: Criterion = "frequency"
    """Which experts a layer keeps: those that the most tokens are routed to, or those of the
    highest REAP, the mean over these tokens of routing weight times norm of the output."""
    random: int = 5
    """Random choices of as many experts to compare with."""
    tokens: int = 200_000
    """Most tokens of text to read, from the beginning of the corpus, which is balanced by domain.
    They are held in memory."""
    bootstrap: int = 1_000
    """Resamples of documents behind each 95% interval."""
    seed: int = 0
    """Seed of the split of the documents, the random choices, the resamples, and the tokens that
    forward passes are timed with."""

    def __post_init__(self) -> None:
        require_least(self, {"tokens": 1, "random": 1})
        if not self.shares and not self.counts:
            raise OptionError("there is no size to try", remedy="Give shares or counts")
        for share in self.shares:
            if not 0 < share < 1:
                raise OptionError("not a share of the routing", got=share, expected="between 0, 1")


class Setting(NamedTuple):
    """A pruned model: how many experts every layer keeps, and by what they were chosen."""

    choice: Choice
    """By the routing of one domain, by that of all the text, or at random."""
    chosen_for: str
    """The domain; "all" for all the text, nothing where it was not by text."""
    kept: int
    """Experts that every layer keeps."""
    draw: int = 0
    """Number of the random choice."""
