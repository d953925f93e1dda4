"""What fewer experts per token save: parameters that a token meets, and time."""

from collections.abc import Sequence
from functools import partial

import pandas as pd

from moescope.analyses.topk.options import TopkOptions, run_of, settings_of
from moescope.analyses.topk.slots import restricted, restrictions
from moescope.analyses.work import parameters_met
from moescope.evaluate.timing import speed
from moescope.models.view import MoEModel

_COLUMNS = [
    "active_parameters",
    "parameters",
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


def cost_table(model: MoEModel, ks: Sequence[int], length: int, seed: int) -> pd.DataFrame:
    """Active parameters and speed of reading a text for each number of experts per token.

    Experts that are left out are not computed: what is timed is a model that uses k experts, with
    the small cost of finding them among those that the router chose. The weights of all experts
    stay in memory.

    Args:
        model: The model.
        ks: Experts per token, of all layers at once; the largest is what the model uses.
        length: Tokens per row of a timed pass.
        seed: Of these tokens.

    Returns:
        k, and what `evaluate.speed` says; `ratio` is of the time of the model as it is.
    """
    *fewer, most = sorted(ks)
    table = speed(
        model,
        {str(k): partial(restricted, restrictions(model.layers, k, "as_is")) for k in fewer},
        length=length,
        seed=seed,
    )
    found = table[_COLUMNS].assign(tokens_per_pass=table["tokens"])
    found.insert(0, "k", [most, *fewer])
    return found.sort_values("k", ignore_index=True)


def operations(model: MoEModel, options: TopkOptions) -> float:
    """Floating-point operations of all passes over the text."""
    runs = {None, *(run_of(model, setting) for setting in settings_of(model, options))}
    return 2.0 * parameters_met(model) * options.tokens * len(runs)
