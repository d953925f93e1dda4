"""Whether tokens and experts can be aligned at all."""

from collections.abc import Mapping

from jaxtyping import Float
from torch import Tensor

from moescope.alignment.options import MINIMUM_HELD_OUT, MINIMUM_TRAIN
from moescope.alignment.result import Status
from moescope.alignment.samples import Samples, require_finite
from moescope.errors import AlignmentError
from moescope.experts.weights import ExpertWeights


def require_fitting(
    train: Samples,
    held_out: Samples,
    targets: Mapping[str, ExpertWeights],
    source: ExpertWeights | None,
    target_inputs: Mapping[str, Tensor],
) -> None:
    """Refuse tensors that do not fit one another.

    Raises:
        AlignmentError: A hidden size differs, or a tensor holds NaN or infinity.
    """
    hidden = train.hidden_size
    experts = {f"target {name}": expert for name, expert in targets.items()}
    if source is not None:
        experts["the source"] = source
    sizes = {"held-out tokens": held_out.hidden_size}
    sizes |= {name: expert.hidden_size for name, expert in experts.items()}
    for name, inputs in target_inputs.items():
        if inputs.ndim != 2 or len(inputs) == 0:
            raise AlignmentError(
                f"inputs of target {name} are no list of tokens",
                got=tuple(inputs.shape),
                expected="[tokens, hidden]",
            )
        sizes[f"inputs of target {name}"] = inputs.shape[1]
        require_finite(f"inputs of target {name}", inputs)
    for name, size in sizes.items():
        if size != hidden:
            raise AlignmentError(
                f"{name}: the hidden size does not fit the training tokens",
                got=size,
                expected=hidden,
            )
    for name, expert in experts.items():
        for part, tensor in expert.tensors().items():
            require_finite(f"{part} of {name}", tensor)


def refusal(train: Samples, held_out: Samples) -> Status | None:
    """Why there will be no numbers, if so."""
    if len(train) < MINIMUM_TRAIN or len(held_out) < MINIMUM_HELD_OUT:
        return "too_few_tokens"
    if not (_vary(train.outputs) and _vary(held_out.outputs)):
        return "constant_outputs"
    return None


def say_enough(target_inputs: Float[Tensor, "tokens hidden"]) -> bool:
    """Whether inputs of a target say where they lie: at least 64 tokens, not all alike."""
    return len(target_inputs) >= MINIMUM_TRAIN and _vary(target_inputs)


def _vary(values: Float[Tensor, "tokens hidden"]) -> bool:
    """Whether tokens differ by more than rounding."""
    wide = values.double()
    return bool((wide - wide.mean(0)).square().sum() > 1e-10 * wide.square().sum())
