"""Models whose weights are read only while they are needed: offload to CPU or disk."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from accelerate.utils import align_module_device, has_offloaded_params
from torch import Tensor, nn


@contextmanager
def resident(module: nn.Module) -> Iterator[None]:
    """Keep the weights of a module and of all modules within in memory.

    They are read once, however many forward passes follow. Without offload nothing happens.
    """
    with ExitStack() as stack:
        for part in module.modules():
            if has_offloaded_params(part):
                stack.enter_context(_resident_itself(part))
        yield


@contextmanager
def _resident_itself(module: nn.Module) -> Iterator[None]:
    hook: Any = module._hf_hook
    with align_module_device(module):
        hook.offload = False  # or the next forward pass would put the weights away again
        try:
            yield
        finally:
            hook.offload = True


def is_offloaded(module: nn.Module) -> bool:
    """Whether weights of a module, or of one within, are put away between forward passes."""
    return any(has_offloaded_params(part) for part in module.modules())


def parameters(module: nn.Module) -> dict[str, Tensor]:
    """The parameters that a module itself holds, detached; read if they are offloaded."""
    with align_module_device(module):
        return {name: tensor.detach() for name, tensor in module.named_parameters(recurse=False)}


def all_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The parameters of a model with their names, those of one module in memory at a time."""
    for path, module in model.named_modules():
        for name, tensor in parameters(module).items():
            yield f"{path}.{name}".lstrip("."), tensor


def state(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers in the order of their names, one in memory at a time."""
    for path, tensor in sorted(model.state_dict().items()):
        owner, _, name = path.rpartition(".")
        if tensor.is_meta:
            tensor = parameters(model.get_submodule(owner))[name]
        yield path, plain(tensor)


def plain(tensor: Tensor) -> Tensor:
    """The numbers of a tensor that may be quantised."""
    return tensor if type(tensor) in (Tensor, nn.Parameter) else tensor.dequantize()


def input_device(model: nn.Module) -> torch.device:
    """Where the inputs of a model go."""
    first = next(model.parameters()).device
    hook: Any = getattr(model, "_hf_hook", None)
    return torch.device(hook.execution_device) if first.type == "meta" and hook else first
