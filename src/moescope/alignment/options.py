"""What can be set about a fit."""

from dataclasses import dataclass
from typing import Literal, get_args

from moescope.errors import OptionError

Protocol = Literal["converged", "published"]

MINIMUM_TRAIN = 64
"""Training tokens below which no number is given."""
MINIMUM_HELD_OUT = 16
"""Held-out tokens below which no number is given."""
WELL_DETERMINED = 4
"""Training tokens per hidden dimension below which a full adapter is underdetermined."""
RANDOM_SEEDS = 5
"""Random targets of each kind."""


@dataclass(frozen=True, kw_only=True)
class SolverOptions:
    """The converged protocol, in numbers."""

    steps: int = 300
    """Most optimiser steps of a fit."""
    batch_tokens: int = 192
    """Tokens per step."""
    matrix_rate: float = 0.2
    """Muon's step on the whitened matrix: spectral norm, at the peak of the schedule."""
    vector_rate: float = 0.3
    """Adam's step on bias, gain and shift, as a share of their starting scale."""
    start_output: float = 0.2
    """Spread of the outputs at the start, as a share of the spread of the source's outputs."""
    shrinkage: float = 0.01
    """Share of the identity mixed into the input covariance before whitening."""
    inner_share: float = 0.15
    """Share of the training tokens kept aside for early stopping and choice."""
    evaluate_every: int = 20
    """Steps between two looks at the inner validation tokens."""
    patience: int = 80
    """Steps without a better inner validation FVU after which a fit stops."""
    settled: float = 0.02
    """A fit has converged when the second half of its steps lowered the inner FVU by less."""
    chunk_bytes: int = 2**25
    """Working memory of the fits that run as one batch: little enough to stay in the cache."""

    def __post_init__(self) -> None:
        if min(self.steps, self.batch_tokens, self.evaluate_every, self.patience) < 1:
            raise OptionError("steps, batch, evaluation and patience are at least 1", got=self)
        if not 0 < self.inner_share < 1:
            raise OptionError(
                "`inner_share` is not a share", got=self.inner_share, expected="between 0 and 1"
            )


@dataclass(frozen=True, kw_only=True)
class FitOptions:
    """How a fit is made, whatever the tensors."""

    protocol: Protocol = "converged"
    """"converged", or "published": ten full-batch steps, as in the MoE Align study."""
    controls: bool = True
    """Whether random targets and hidden-rotation self are fitted too; the score needs them."""
    budget_seconds: float | None = None
    """Wall time that training may take, for all fits of a source together; None: no limit."""
    seed: int = 0
    """Of all random choices."""
    solver: SolverOptions = SolverOptions()
    """The converged protocol, in numbers."""

    def __post_init__(self) -> None:
        if self.protocol not in get_args(Protocol):
            raise OptionError(
                f"unknown protocol {self.protocol!r}", expected=" or ".join(get_args(Protocol))
            )
        if self.budget_seconds is not None and not self.budget_seconds > 0:
            raise OptionError(
                "`budget_seconds` leaves no time", got=self.budget_seconds, expected="more than 0"
            )
