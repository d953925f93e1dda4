"""Tries every intervention on a model: which work, which are refused and why."""

from collections.abc import Callable
from contextlib import AbstractContextManager

import pandas as pd
import torch
from torch import Tensor

from moescope.errors import MoEScopeError
from moescope.experts.adapter import Adapter
from moescope.interventions.blocks import swap_blocks
from moescope.interventions.choice import mask_experts, set_top_k
from moescope.interventions.functions import (
    insert_adapter,
    replace_output,
    scale_expert,
    substitute,
)
from moescope.interventions.tensors import ablate_neurons, swap_experts
from moescope.models.conformance import sample_ids
from moescope.models.observe import Observation, observe
from moescope.models.view import MoELayer, MoEModel

Context = AbstractContextManager[None]


def support(model: MoEModel) -> pd.DataFrame:
    """Try every intervention, on a few random tokens (fixed seed) and the busiest experts.

    Returns:
        One row per intervention (those between two layers only if there are two): intervention,
        works (it was not refused), reason (of the refusal, or empty), change (relative, of what the
        model returns, meanwhile), left (the same, afterwards: 0 where everything was put back).
    """
    ids = sample_ids(model)
    before = _outputs(model, ids)
    return pd.DataFrame(
        {"intervention": name, **_tried(model, ids, before, make)}
        for name, make in _interventions(model, ids).items()
    )


def _tried(
    model: MoEModel, ids: Tensor, before: Tensor, make: Callable[[], Context]
) -> dict[str, object]:
    try:
        with make():
            change = _difference(_outputs(model, ids), before)
        reason = ""
    except MoEScopeError as error:
        change, reason = float("nan"), str(error)
    left = _difference(_outputs(model, ids), before)
    return {"works": not reason, "reason": reason, "change": change, "left": left}


def _interventions(model: MoEModel, ids: Tensor) -> dict[str, Callable[[], Context]]:
    """Each of them ready to be entered, on the first and the last layer of the model."""
    first, last = model.layers[0], model.layers[-1]
    busy = _busiest(model, ids)
    source, rare, target = busy[first][0], busy[first][-1], busy[last][0]
    shift = torch.full((first.hidden_size,), 0.5)
    adapter = Adapter(gain=2 * torch.ones_like(shift), shift=shift, form="scale")
    within: dict[str, Callable[[], Context]] = {
        "mask_experts": lambda: mask_experts(first, [source]),
        "set_top_k": lambda: set_top_k(model.layers, first.top_k - 1),
        "swap_experts": lambda: swap_experts((first, source), (first, rare)),
        "substitute": lambda: substitute((first, source), (last, target), adapter),
        "insert_adapter": lambda: insert_adapter((first, source), adapter),
        "scale_expert": lambda: scale_expert((first, source), 2.0),
        "replace_output": lambda: replace_output((first, source), shift),
        "ablate_neurons": lambda: ablate_neurons((first, source), range(first.intermediate_size)),
    }
    across: dict[str, Callable[[], Context]] = {
        "swap_experts of two layers": lambda: swap_experts((first, source), (last, target)),
        "swap_blocks": lambda: swap_blocks(first, last),
        "swap_blocks, experts_only": lambda: swap_blocks(first, last, experts_only=True),
    }
    return within | across if first is not last else within


def _busiest(model: MoEModel, ids: Tensor) -> dict[MoELayer, list[int]]:
    """The experts of each layer that have parameters, the most used first."""
    busiest: dict[MoELayer, list[int]] = {}

    def count(observation: Observation) -> None:
        layer, routing = observation.layer, observation.routing
        used = routing.experts[routing.weights != 0]
        order = used.bincount(minlength=layer.num_experts).argsort(descending=True)
        busiest[layer] = [e for e in order.tolist() if layer.expert_tensors(e)]

    with observe(model.layers, count):
        _outputs(model, ids)
    return busiest


@torch.no_grad()
def _outputs(model: MoEModel, ids: Tensor) -> Tensor:
    outputs: Tensor = model.forward(ids, head=True)[0]
    return outputs


def _difference(outputs: Tensor, before: Tensor) -> float:
    return float((outputs - before).double().norm() / before.double().norm())
