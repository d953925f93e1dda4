"""What a block does around its experts, found by running it without them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from moescope.errors import ModelError
from moescope.models.patching import Forward, wrapped

_ROUNDING = 0.05  # of outputs in half precision


class _Called(Exception):  # noqa: N818
    """Raised in place of running a module."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__()
        self.arguments = arguments


def arguments_given(module: nn.Module, run: Callable[[], Any]) -> tuple[Any, ...]:
    """With what `run()` calls `module`; neither the module nor what comes after it runs.

    Raises:
        ModelError: It does not call it.
    """

    def stop(_: Forward) -> Forward:
        def forward(*arguments: Any) -> Any:
            raise _Called(*arguments)

        return forward

    try:
        with wrapped(module, stop):
            run()
    except _Called as called:
        return called.arguments
    raise ModelError(f"a block does not call its {type(module).__name__}")


@torch.no_grad()
def scale_of(experts: nn.Module, block: nn.Module, zeros: Tensor) -> float:
    """What a block multiplies the sum of its experts by: 1, or the nearest number that it holds.

    Nearest to what it does to experts that give one rather than zero, for inputs of `zeros`.

    Raises:
        ModelError: It does not multiply: experts that give two do not do twice as much.
    """
    outputs = []
    for constant in (0.0, 1.0, 2.0):
        with wrapped(experts, _giving(constant)):
            output: Any = block.forward(zeros)
        outputs.append(output[0] if isinstance(output, tuple) else output)
    once, twice = ((output - outputs[0]).mean().item() for output in outputs[1:])
    if abs(twice - 2 * once) > _ROUNDING * abs(twice):
        raise ModelError(
            f"a {type(block).__name__} does more to the sum of its experts than multiply it",
            got=f"{twice:.3g} for experts that give 2, {once:.3g} for experts that give 1",
            expected="twice as much",
        )
    held = [value for value in vars(block).values() if isinstance(value, float | int)]
    return float(min([1, *held], key=lambda number: abs(number - once)))


def _giving(constant: float) -> Callable[[Forward], Forward]:
    def around(_: Forward) -> Forward:
        return lambda x, *_: torch.full_like(x, constant)

    return around
