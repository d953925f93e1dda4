"""What can be set about `ood`."""

from dataclasses import dataclass

from moescope.alignment.options import FitOptions, Form
from moescope.config import IntList
from moescope.errors import OptionError, require_least


@dataclass(frozen=True, kw_only=True)
class OodOptions:
    """Options of `ood`."""

    source: int | None = None
    """Layer whose experts are imitated, by the model's own number; the first if left out."""
    target: int | None = None
    """Layer whose experts imitate them; the next one with experts if left out."""
    source_experts: IntList = ()
    """Experts of the source layer; if left out, the `sources` ones that have most tokens of the
    domain that uses them least."""
    sources: int = 3
    """How many experts to choose, where none are named."""
    target_experts: IntList = ()
    """Experts of the target layer to choose from, for each source, by the error on training tokens
    of all domains that are set aside for it; all if left out."""
    random: int = 2
    """Random experts with the target's down projection, trained and tested the same way."""
    domains: tuple[str, ...] = ()
    """Domains to train on and to test on; all if left out."""
    form: Form = "low_rank"
    """What the adapter may do: `low_rank`, `layer_norm`, `linear`, `orthogonal`, `scale` or
    `identity`."""
    rank: int = 16
    """Rank of what a low-rank adapter adds to its diagonal."""
    max_train: int = 2_000
    """Most training tokens of an adapter: as many of every domain, and of all together."""
    losses: bool = True
    """Whether the adapters are put into the model, and the loss measured by domain."""
    tokens: int = 40_000
    """About how many tokens losses are measured on; domains take turns, and their documents, row by
    row."""
    bootstrap: int = 1_000
    """Resamples of documents behind the intervals of single pairs of experts."""
    seed: int = 0
    """Seed of every random choice."""

    def __post_init__(self) -> None:
        require_least(self, {"sources": 1, "random": 1, "max_train": 1, "tokens": 1})
        if (self.source is None) != (self.target is None):
            raise OptionError(
                "`source` and `target` go together", got=f"{self.source} and {self.target}"
            )
        if len(self.domains) == 1:
            raise OptionError("one domain has no other to be tested on", got=self.domains[0])
        self.fit_options()

    def fit_options(self) -> FitOptions:
        """How adapters are fitted.

        Raises:
            OptionError: The options do not fit one another.
        """
        return FitOptions(form=self.form, rank=self.rank, controls=False, seed=self.seed)
