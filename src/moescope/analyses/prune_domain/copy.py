"""A pruned copy of a model, to measure what pruning saves; the model itself stays what it is."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import psutil
import torch

from moescope.analyses.prune_domain.choice import Kept
from moescope.errors import ModelError, OptionError
from moescope.models.discover import moe_layers
from moescope.models.view import MoEModel
from moescope.surgery.experts import keep_experts

_ROOM = 2
"""Times the bytes of the experts that must be free for them to be copied."""


def pruned_copy(model: MoEModel, kept: Kept) -> MoEModel | None:
    """A model of these experts alone, which has all other weights in common with `model`.

    Returns:
        None where memory is short or `keep_experts` refuses, as where rounding in half precision
        has a router choose otherwise.
    """
    try:
        if _free_bytes(model.device) < _ROOM * _expert_bytes(kept):
            return None
        tensors = [*model.model.parameters(), *model.model.buffers()]
        network = copy.deepcopy(model.model, {id(tensor): tensor for tensor in tensors})
        smaller = replace(model, model=network, layers=moe_layers(network))
        keep_experts(smaller, dict(zip(smaller.layers, kept.values(), strict=True)))
    except (ModelError, OptionError):
        return None
    return smaller


@contextmanager
def standing_in(model: MoEModel, smaller: MoEModel) -> Iterator[None]:
    """Have `model` be another one for a while."""
    former = dict(vars(model))
    vars(model).update(model=smaller.model, layers=smaller.layers)
    try:
        yield
    finally:
        vars(model).update(former)


def _expert_bytes(kept: Kept) -> int:
    return sum(
        tensor.nbytes
        for layer, experts in kept.items()
        for expert in experts
        for tensor in layer.expert_tensors(expert).values()
    )


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return int(psutil.virtual_memory().available)
