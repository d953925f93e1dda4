"""What can be set about a fit."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from moescope.errors import OptionError, unknown
from moescope.experts.adapter import Form as Form

Protocol = Literal["converged", "published"]
Precision = Literal["float32", "bfloat16"]
Regulariser = Literal["none", "gaussian_kl", "mmd"]

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
    batch_tokens: int = 256
    """Tokens per step."""
    precision: Precision = "float32"
    """Of the matrix products of a step: "bfloat16" is faster where the processor has it. Weights
    are kept, and all errors computed, in fp32."""
    matrix_rate: float = 0.2
    """Muon's step on the matrix at the peak of the schedule: spectral norm, in starting units."""
    decay: float = 0.1
    """How much of the matrix before LayerNorm a step takes away, times its rate."""
    vector_rate: float = 0.3
    """Adam's step on the vectors at the peak of the schedule, in starting units."""
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
    form: Form = "layer_norm"
    """What the adapter may do: layer_norm, linear, orthogonal, low_rank, scale or identity."""
    rank: int = 16
    """Rank of what a low-rank adapter adds to its diagonal; the other forms do not use it.
    At most the hidden size is taken."""
    regulariser: Regulariser = "none"
    """What keeps adapted inputs near the target's own: "gaussian_kl" or "mmd"; "none": nothing."""
    regulariser_weight: float = 1.0
    """Of the regulariser beside the FVU in the training loss."""
    solver: SolverOptions = SolverOptions()
    """The converged protocol, in numbers."""

    def __post_init__(self) -> None:
        if self.protocol not in get_args(Protocol):
            raise OptionError(
                f"unknown protocol {self.protocol!r}", expected=" or ".join(get_args(Protocol))
            )
        if self.form not in get_args(Form):
            raise unknown("adapter form", self.form, get_args(Form))
        if self.rank < 0:
            raise OptionError("`rank` is negative", got=self.rank, expected="0 or more")
        if self.regulariser not in get_args(Regulariser):
            raise unknown("regulariser", self.regulariser, get_args(Regulariser))
        if self.protocol == "published" and self.regulariser != "none":
            raise OptionError(
                "the published protocol has no regulariser",
                got=self.regulariser,
                remedy='Leave it out, or take `protocol="converged"`',
            )
        if self.protocol == "published" and self.form != "layer_norm":
            raise OptionError(
                "the published protocol has no other form of adapter",
                got=self.form,
                expected="layer_norm",
                remedy='Leave it out, or take `protocol="converged"`',
            )
        if not 0 <= self.regulariser_weight < math.inf:
            raise OptionError(
                "`regulariser_weight` is no weight",
                got=self.regulariser_weight,
                expected="0 or more",
            )
        if self.budget_seconds is not None and not self.budget_seconds > 0:
            raise OptionError(
                "`budget_seconds` leaves no time", got=self.budget_seconds, expected="more than 0"
            )
