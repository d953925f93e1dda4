"""What a pruned model saves: weights in memory, and time."""

from collections.abc import Hashable, Mapping
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from moescope.analyses.prune_domain.choice import Kept, pruned
from moescope.analyses.prune_domain.copy import pruned_copy, standing_in
from moescope.analyses.prune_domain.options import PruneDomainOptions
from moescope.analyses.topk.cost import operations as topk_operations
from moescope.analyses.topk.options import TopkOptions, most_experts
from moescope.errors import ModelError
from moescope.evaluate.timing import speed
from moescope.models.view import MoEModel

UNPRUNED, COPY, MASKED = "as it is", "pruned copy", "masked"
"""What a row of the table was measured on."""
_COLUMNS = [
    "kept",
    "num_experts",
    "parameters",
    "weight_bytes",
    "weights_left",
    "timed_as",
    "active_parameters",
    "seconds_per_token",
    "seconds_per_token_low",
    "seconds_per_token_high",
    "ratio",
    "repeats",
    "device",
    "dtype",
    "threads",
    "seed",
    "tokens_per_pass",
]
_USUAL_DOMAINS = 4  # where all domains are asked for, whose number the text alone knows


def saving_table(model: MoEModel, kept: Mapping[int, Kept], length: int, seed: int) -> pd.DataFrame:
    """Weights, parameters and time for each number of experts that every layer keeps.

    Measured on a pruned copy, one size after the other, each in turns with the model as it is.
    Where no copy can be had, time is measured with the others masked (they are not computed, but
    still in memory), and bytes and parameters are counted: those of the model less those of the
    experts that are left out, without the rows of routers that go with them.

    Args:
        model: The model.
        kept: One choice of each size.
        length: Tokens per row of a timed pass.
        seed: Of these tokens.

    Returns:
        One row per size, the last of them the model as it is. `ratio` is of its time.
    """
    most = max(layer.num_experts for layer in model.layers)
    rows = [_row(model, count, experts, length, seed) for count, experts in kept.items()]
    whole, _ = rows[0]
    found = pd.DataFrame([whole | {"kept": most, "timed_as": UNPRUNED}, *(row for _, row in rows)])
    found["weights_left"] = found["weight_bytes"] / whole["weight_bytes"]
    found["num_experts"] = most
    return found[_COLUMNS].sort_values("kept", ignore_index=True)


def _row(
    model: MoEModel, count: int, kept: Kept, length: int, seed: int
) -> tuple[dict[Hashable, Any], dict[Hashable, Any]]:
    """Columns of the model as it is, and of the one of `count` experts per layer."""
    smaller = pruned_copy(model, kept)
    change = partial(pruned, kept) if smaller is None else partial(standing_in, model, smaller)
    timed = speed(model, {str(count): change}, length=length, seed=seed)
    timed = timed.rename(columns={"tokens": "tokens_per_pass"})
    whole, row = timed.to_dict("records")
    row |= {"kept": count, "timed_as": MASKED if smaller is None else COPY}
    if smaller is None:
        parameters, row_bytes = _left_out(kept)
        row |= {"parameters": whole["parameters"] - parameters}
        row |= {"weight_bytes": whole["weight_bytes"] - row_bytes}
    return whole, row


def _left_out(kept: Kept) -> tuple[float, float]:
    """Parameters and bytes of the experts that do not stay; NaN where they cannot be counted."""
    try:
        tensors = [
            tensor
            for layer, experts in kept.items()
            for expert in set(range(layer.num_experts)) - set(experts)
            for tensor in layer.expert_tensors(expert).values()
        ]
    except ModelError:
        return np.nan, np.nan
    return float(sum(t.numel() for t in tensors)), float(sum(t.nbytes for t in tensors))


def operations(model: MoEModel, options: PruneDomainOptions) -> float:
    """Floating-point operations of all passes over the text, for as many domains as usual."""
    once = TopkOptions(k=(most_experts(model.layers),), weights=("as_is",), tokens=options.tokens)
    sizes = len(options.counts or options.shares)
    choices = (len(options.domains) or _USUAL_DOMAINS) + 1 + options.random
    return (1 + sizes * choices) * topk_operations(model, once)
