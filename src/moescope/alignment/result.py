"""What a fit found."""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal

from moescope.alignment.solver import CurvePoint
from moescope.experts.adapter import Adapter

Status = Literal[
    "too_few_tokens",
    "constant_outputs",
    "no_controls",
    "no_ceiling",
    "undefined",
    "few_documents",
    "not_settled",
    "underdetermined",
    "ok",
]
"""What the numbers may be used for; where several hold, the first:

too_few_tokens    under 64 training or 16 held-out tokens: no numbers
constant_outputs  the source's outputs do not vary: no numbers
no_controls       controls were switched off: no score
no_ceiling        the source expert was not given: no score
undefined         null and ceiling are less than 0.05 apart: no score
few_documents     under 30 held-out documents, or documents not known: no intervals
not_settled       the budget ended the fit of the pair, or of its ceiling, before it had converged
underdetermined   the form asked for has more freedom than the data: a full matrix under 4 H
                  training tokens, where `layer_norm` is fitted as `low_rank`, or a rank above an
                  eighth of them
ok                none of these
"""

_NOT_COLUMNS = ("adapter", "curve", "self_curve")
_NAN = math.nan


@dataclass(frozen=True, kw_only=True, eq=False)
class AlignmentResult:
    """How well one expert imitates another behind an adapter, beside its controls.

    All errors are on held-out tokens that were used for nothing else. NaN means that a number could
    not be had; `status` says why.
    """

    adapter: Adapter | None
    """The trained adapter, None where there are too few tokens or constant outputs."""
    curve: Sequence[CurvePoint] = ()
    """Inner validation FVU while training (converged protocol)."""
    self_curve: Sequence[CurvePoint] = ()
    """The same for the hidden-rotation self."""
    protocol: str
    """"converged" or "published"."""
    form: str = "layer_norm"
    """What the adapter could do, as fitted: `low_rank` where a full one is underdetermined."""
    rank: int = 0
    """Rank of its trained matrix, 0 where the form has none."""
    n_train: int
    """Training tokens."""
    n_val: int
    """Held-out tokens."""
    n_documents: int
    """Held-out documents, 0 where they are not known."""
    mse_mean: float = _NAN
    """Mean-squared error, averaged over tokens and dimensions."""
    mse_sum: float = _NAN
    """The same summed over dimensions: H times as large."""
    published_mse: float = _NAN
    """Training error that the published loop prints for the same training tokens."""
    fvu: float = _NAN
    """Squared error over the squared distance of the outputs from their training mean."""
    fvu_low: float = _NAN
    """Lower end of its 95% interval over documents."""
    fvu_high: float = _NAN
    """Upper end."""
    cosine: float = _NAN
    """Mean cosine of wanted and given outputs."""
    token_error: float = _NAN
    """Median over tokens of |error| / |wanted output|."""
    fvu_constant: float = _NAN
    """FVU of the best constant output of the target."""
    fvu_identity: float = _NAN
    """FVU of the target without adapter."""
    fvu_linear: float = _NAN
    """FVU of a linear map without the target."""
    fvu_random: float = _NAN
    """Mean FVU of the random targets of both kinds."""
    fvu_random_sd: float = _NAN
    """Their standard deviation."""
    fvu_random_down: float = _NAN
    """Mean FVU of the random targets with the true down projection."""
    fvu_random_all: float = _NAN
    """Mean FVU of the random targets with three random matrices."""
    fvu_floor: float = _NAN
    """FVU that no adapter can pass below: outputs projected on the target's output space."""
    fvu_self: float = _NAN
    """FVU of the source itself behind a hidden rotation: what the solver can reach."""
    kl_before: float = _NAN
    """Gaussian KL of the source's inputs from the target's own, nats per dimension."""
    kl_after: float = _NAN
    """The same of the adapted inputs; NaN where the target's inputs are not known."""
    mmd_before: float = _NAN
    """Squared maximum mean discrepancy of the source's inputs and the target's own."""
    mmd_after: float = _NAN
    """The same of the adapted inputs."""
    score: float = _NAN
    """(null - fvu) / (null - fvu_self); zero or less is no evidence."""
    score_low: float = _NAN
    """Lower end of its 95% interval, over documents and one more random target in the null."""
    score_high: float = _NAN
    """Upper end."""
    steps: int = 0
    """Optimiser steps."""
    converged: bool = False
    """Whether steps were taken, beat the constant, and changed little in their second half; where
    the budget ended them, there were enough to tell."""
    constant_kept: bool = False
    """Whether the constant-output adapter was kept: no fit beat it."""
    underdetermined: bool = False
    """Whether the form asked for has more freedom than the data, whatever else `status` says."""
    self_converged: bool = False
    """`converged` of the hidden-rotation self; False where there is none."""
    status: Status
    """What the numbers may be used for."""
    adapter_parameters: int
    """Numbers in the adapter."""
    expert_parameters: int
    """Numbers in the target expert."""
    parameters_share: float = _NAN
    """Numbers in the adapter over those in the expert: what replacing one would cost."""
    seed: int
    """Of all random choices."""

    def row(self) -> dict[str, float | int | str | bool]:
        """Everything but adapter and curves, by column name."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in _NOT_COLUMNS}

    def __repr__(self) -> str:
        return (
            f"AlignmentResult({self.status}: FVU {self.fvu:.3f}, score {self.score:.2f} "
            f"[{self.score_low:.2f}, {self.score_high:.2f}], linear {self.fvu_linear:.3f}, "
            f"random {self.fvu_random:.3f}, self {self.fvu_self:.3f})"
        )

    def _repr_html_(self) -> str:
        cells = "".join(
            f"<tr><th>{name}</th><td>{html.escape(_shown(value))}</td></tr>"
            for name, value in self.row().items()
        )
        return f"<table>{cells}</table>"


def _shown(value: object) -> str:
    if isinstance(value, float):
        return "not available" if math.isnan(value) else f"{value:.4g}"
    return str(value)
