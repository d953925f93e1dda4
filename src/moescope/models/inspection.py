"""A table of a model's layers, and the proof that they are understood."""

import pandas as pd

from moescope.models.conformance import conformance, sample_ids
from moescope.models.view import MoEModel


def inspect(model: MoEModel) -> pd.DataFrame:
    """One row per mixture-of-experts layer: what it is made of, and its conformance.

    Returns:
        stack, layer, family, num_experts, top_k, hidden_size, intermediate_size, shared_expert,
        max_abs_error, relative_error, passed; the last three as in `conformance`.
    """
    facts = pd.DataFrame(
        {
            "stack": layer.stack,
            "layer": layer.index,
            "num_experts": layer.num_experts,
            "top_k": layer.top_k,
            "hidden_size": layer.hidden_size,
            "intermediate_size": layer.intermediate_size,
            "shared_expert": layer.has_shared_expert,
        }
        for layer in model.layers
    )
    checked = conformance(model, sample_ids(model))
    table = facts.merge(checked, on=["stack", "layer"], validate="one_to_one")
    return table[["stack", "layer", "family", *table.columns.drop(["stack", "layer", "family"])]]
