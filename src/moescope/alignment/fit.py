"""One pair of experts: can the target stand in for the source behind a change of input?"""

from jaxtyping import Float
from torch import Tensor

from moescope.alignment.checks import say_enough
from moescope.alignment.options import (
    MINIMUM_TRAIN,
    FitOptions,
    Form,
    Protocol,
    Regulariser,
    SolverOptions,
)
from moescope.alignment.pairs import fit_pairs
from moescope.alignment.result import AlignmentResult
from moescope.alignment.samples import Samples
from moescope.errors import AlignmentError
from moescope.experts.weights import ExpertWeights

__all__ = ["AlignmentResult", "fit"]


def fit(
    train: Samples,
    held_out: Samples,
    target: ExpertWeights,
    *,
    source: ExpertWeights | None = None,
    target_inputs: Float[Tensor, "..."] | None = None,
    protocol: Protocol = "converged",
    form: Form = "layer_norm",
    rank: int = 16,
    regulariser: Regulariser = "none",
    regulariser_weight: float = 1.0,
    controls: bool = True,
    budget_seconds: float | None = None,
    seed: int = 0,
    solver: SolverOptions = SolverOptions(),  # noqa: B008 (frozen)
) -> AlignmentResult:
    """Train an adapter `A` so that `target(A(x))` comes near the outputs of the source expert.

    Args:
        train: Inputs and outputs of the source expert to learn from.
        held_out: Others, of other documents, for the reported errors.
        target: The expert to put behind the adapter; frozen.
        source: The expert that made the outputs; without it there is no ceiling and no score.
        target_inputs: Inputs [tokens, hidden] of the target in its own layer, where known: they
            give the fit its start. Under 64 tokens, or where all are alike, they are not used.
        protocol: "converged", or "published": the ten steps of the MoE Align study.
        form: What the adapter may do; "layer_norm" is fitted as "low_rank" where there are fewer
            than four training tokens per dimension.
        rank: Of a low-rank adapter.
        regulariser: What keeps the adapted inputs near the target's own.
        regulariser_weight: Its weight beside the FVU in the training loss.
        controls: Whether random targets and hidden-rotation self are fitted too.
        budget_seconds: Wall time that training may take, controls included.
        seed: Of all random choices.
        solver: The converged protocol, in numbers.

    Raises:
        AlignmentError: Shapes do not fit, a tensor holds NaN or infinity, or a regulariser is
            wanted and the target's inputs are not known.
    """
    if regulariser != "none" and (target_inputs is None or not say_enough(target_inputs)):
        raise AlignmentError(
            f"the regulariser {regulariser!r} needs inputs of the target in its own layer",
            got="none" if target_inputs is None else f"{len(target_inputs)} tokens",
            expected=f"`target_inputs` of at least {MINIMUM_TRAIN} tokens that are not all alike",
        )
    options = FitOptions(
        protocol=protocol,
        form=form,
        rank=rank,
        regulariser=regulariser,
        regulariser_weight=regulariser_weight,
        controls=controls,
        budget_seconds=budget_seconds,
        seed=seed,
        solver=solver,
    )
    inputs = {} if target_inputs is None else {"target": target_inputs}
    found = fit_pairs(
        train, held_out, {"target": target}, source=source, target_inputs=inputs, options=options
    )
    return found["target"]
