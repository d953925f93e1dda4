"""Whether experts with similar router rows have similar neurons, by layer and over all."""

from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from moescope.analyses.weights.options import WeightsOptions
from moescope.analyses.weights.pairs import Cells
from moescope.analyses.weights.reading import Summary
from moescope.measures.dyadic import Mantel, mantel, permutation_p
from moescope.measures.multiple_tests import holm

_ROUTERS = {"average": "router", "centred": "centred_router"}
"""Cosines of router rows beside those of mean neurons: both as they are, or both centred. What is
common to all router rows is common to all logits, and changes no softmax."""


class Association(NamedTuple):
    """Router rows against one matrix in one layer."""

    layer: Summary
    """Where."""
    form: str
    """`average` or `centred`."""
    matrix: str
    """gate, up or down."""
    found: Mantel
    """Correlation and test."""


def associations(summary: Summary, cells: Cells, options: WeightsOptions) -> list[Association]:
    """Every form and matrix of a layer."""
    return [
        Association(
            summary,
            form,
            matrix,
            mantel(
                cells[router],
                cells[f"{form}_{matrix}"],
                permutations=options.permutations,
                seed=[options.seed, summary.layer, int(summary.stack == "encoder")],
            ),
        )
        for form, router in _ROUTERS.items()
        for matrix in summary.squares
    ]


def router_table(every: list[Association]) -> pd.DataFrame:
    """One row per layer, form and matrix, with p-values corrected over all of them."""
    rows: list[dict[str, Any]] = [
        {**layer.place, "form": form, "matrix": matrix}
        | {"r": found.r, "r_squared": found.r**2, "p_value": found.p_value}
        | {"n_experts": len(layer.experts), "n_pairs": found.n_pairs}
        | {"permutations": len(found.null)}
        for layer, form, matrix, found in every
    ]
    table = pd.DataFrame(rows)
    table["p_corrected"] = holm(table["p_value"].to_numpy(float))
    return table


def together_table(every: list[Association]) -> pd.DataFrame:
    """The mean correlation over layers, tested by permuting the experts of every layer at once."""
    rows = []
    for form, matrix in dict.fromkeys((a.form, a.matrix) for a in every):
        found = [a.found for a in every if (a.form, a.matrix) == (form, matrix)]
        found = [one for one in found if np.isfinite(one.r)]
        if not found:
            continue
        r = float(np.mean([one.r for one in found]))
        null = np.mean([one.null for one in found], axis=0)
        rows.append(
            {"form": form, "matrix": matrix, "mean_r": r, "p_value": permutation_p(r, null)}
            | {"n_layers": len(found), "n_pairs": sum(one.n_pairs for one in found)}
            | {"permutations": len(null)}
        )
    table = pd.DataFrame(rows)
    if len(table):
        table["p_corrected"] = holm(table["p_value"].to_numpy(float))
    return table
