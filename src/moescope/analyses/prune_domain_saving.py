"""What a pruned model saves: weights in memory by counting, time by measuring."""

from collections.abc import Mapping
from functools import partial

import numpy as np
import pandas as pd

from moescope.analyses.prune_domain_choice import Kept, pruned
from moescope.analyses.prune_domain_options import PruneDomainOptions
from moescope.analyses.topk_cost import operations as topk_operations
from moescope.analyses.topk_options import TopkOptions, most_experts
from moescope.errors import ModelError
from moescope.evaluate.timing import speed
from moescope.models.view import MoEModel

_TIMED = [
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
]
_USUAL_DOMAINS = 4  # where all domains are asked for, whose number the text alone knows


def saving_table(model: MoEModel, kept: Mapping[int, Kept], length: int, seed: int) -> pd.DataFrame:
    """Weights, parameters and time for each number of experts that every layer keeps.

    Bytes and parameters are those of the model less those of the experts that are left out, which
    are the same for any choice; rows of routers, which go with them, are not counted. Time is
    measured with the others masked: they are not computed, but they are still in memory.

    Args:
        model: The model.
        kept: One choice of each size.
        length: Tokens per row of a timed pass.
        seed: Of these tokens.

    Returns:
        One row per size, the last of them the model as it is. `ratio` is of its time.
    """
    changes = {str(count): partial(pruned, experts) for count, experts in kept.items()}
    table = speed(model, changes, length=length, seed=seed)
    most = max(layer.num_experts for layer in model.layers)
    found = pd.DataFrame({"kept": [most, *kept], "num_experts": most})
    left_out = np.array([(0, 0), *(_left_out(experts) for experts in kept.values())])
    found["parameters"] = table["parameters"] - left_out[:, 0]
    found["weight_bytes"] = table["weight_bytes"][0] - left_out[:, 1]
    found["weights_left"] = found["weight_bytes"] / table["weight_bytes"][0]
    found[_TIMED] = table[_TIMED]
    return found.assign(tokens_per_pass=table["tokens"]).sort_values("kept", ignore_index=True)


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
