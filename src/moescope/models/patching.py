"""Changes what modules do for a while, and puts everything back."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode

Forward = Callable[..., Any]

_changed: list[nn.Module] = []


@contextmanager
def noted(module: nn.Module) -> Iterator[None]:
    """Note that something within a module is not what its weights say."""
    _changed.append(module)
    try:
        yield
    finally:
        _changed.remove(module)


def is_changed(model: nn.Module) -> bool:
    """Whether a module of the model is noted."""
    return not set(_changed).isdisjoint(model.modules())


@contextmanager
def wrapped(module: nn.Module, wrapper: Callable[[Forward], Forward]) -> Iterator[None]:
    """Have `wrapper(module.forward)` run in place of `module.forward`; hooks run around it."""
    own = vars(module)
    before = own.get("forward")
    own["forward"] = wrapper(module.forward)
    try:
        with noted(module):
            yield
    finally:
        if before is None:
            del own["forward"]
        else:
            own["forward"] = before


@contextmanager
def masked_choice(
    block: nn.Module, router: nn.Module, num_experts: int, masked: Sequence[int]
) -> Iterator[None]:
    """Have the router of a block choose as if the `masked` experts did not exist.

    Within its forward pass their logits are as low as numbers go, and so are the biases by which
    some routers choose, their own or their block's. What the router says of the others stays what
    it is, up to a softmax over all of them.
    """
    chosen = list(masked)

    def low_logits(forward: Forward) -> Forward:
        def masking(*arguments: Any, **named: Any) -> Any:
            with (
                _LowLogits(num_experts, chosen),
                _low_biases(router, num_experts, chosen),
            ):
                return forward(*arguments, **named)

        return masking

    def low_biases(forward: Forward) -> Forward:
        def masking(*arguments: Any, **named: Any) -> Any:
            with _low_biases(block, num_experts, chosen, recurse=False):
                return forward(*arguments, **named)

        return masking

    with wrapped(router, low_logits), wrapped(block, low_biases):
        yield


@contextmanager
def _low_biases(
    module: nn.Module, num_experts: int, masked: list[int], *, recurse: bool = True
) -> Iterator[None]:
    """During one pass only: parameters may change their places meanwhile."""
    biases = [
        tensor
        for tensor in chain(module.parameters(recurse), module.buffers(recurse))
        if tensor.numel() == tensor.shape[-1:].numel() == num_experts and tensor.is_floating_point()
    ]
    originals = [bias.data for bias in biases]
    try:
        for bias in biases:
            bias.data = bias.data.index_fill(-1, _indices(masked, bias), _lowest(bias))
        yield
    finally:
        for bias, original in zip(biases, originals, strict=True):
            bias.data = original


class _LowLogits(TorchFunctionMode):
    """Linear maps to one number per expert give the lowest number there is for some experts."""

    def __init__(self, num_experts: int, masked: list[int]) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.masked = masked

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: Any = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        if func is linear and output.shape[-1] == self.num_experts:
            output = output.index_fill(-1, _indices(self.masked, output), _lowest(output))
        return output


def _indices(masked: list[int], beside: Tensor) -> Tensor:
    return torch.tensor(masked, device=beside.device)


def _lowest(tensor: Tensor) -> float:
    """Half the lowest number, so that two of them can be added."""
    return torch.finfo(tensor.dtype).min / 2
