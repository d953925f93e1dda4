"""What can be set about `damage`."""

from dataclasses import dataclass

from moescope.alignment.options import FitOptions, Form
from moescope.errors import OptionError, require_least


@dataclass(frozen=True, kw_only=True)
class DamageOptions:
    """Options of `damage`."""

    pairs: int = 60
    """Most pairs of experts to swap, and to substitute one by the other; drawn in fours of the same
    two layers, no expert in two pairs: at most half as many as experts."""
    others: int = 8
    """Experts of its own layer among which each looks for its nearest; at random, if there are
    more."""
    targets: int = 4
    """Experts of other layers that are aligned with each, at random."""
    tokens: int = 12_000
    """About how many tokens of held-out documents losses are measured on; domains take turns,
    and their documents, row by row."""
    measure_tokens: int = 40_000
    """The same of the other documents, for norms of outputs and use of the experts."""
    form: Form = "low_rank"
    """What the adapters may do: `low_rank`, `layer_norm`, `linear`, `orthogonal`, `scale` or
    `identity`."""
    rank: int = 16
    """Rank of what a low-rank adapter adds to its diagonal."""
    max_tokens: int = 2_000
    """Most tokens of an expert that adapters and outputs are compared on, held out ones
    included."""
    held_out_share: float = 0.2
    """Share of every domain's documents on which losses are measured, and nothing else."""
    halves: int = 100
    """Random splits of these documents in two, to see how far the damage itself is settled."""
    bootstrap: int = 1_000
    """Resamples of documents behind the 95% interval of each loss."""
    seed: int = 0
    """Seed of every random choice."""

    def __post_init__(self) -> None:
        least = {"pairs": 0, "others": 1, "targets": 0, "tokens": 1, "measure_tokens": 1}
        require_least(self, {**least, "max_tokens": 1, "halves": 1})
        if not 0 < self.held_out_share < 1:
            raise OptionError(
                "held_out_share is not a share", got=self.held_out_share, expected="0 to 1"
            )
        self.fit_options()

    def fit_options(self) -> FitOptions:
        """How adapters are fitted.

        Raises:
            OptionError: The options do not fit one another.
        """
        return FitOptions(form=self.form, rank=self.rank, controls=False, seed=self.seed)
