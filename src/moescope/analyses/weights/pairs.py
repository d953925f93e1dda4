"""Every expert against every other, within a layer and across two."""

from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from torch import Tensor

from moescope.analyses.weights.reading import ALL, LayerExperts, Summary
from moescope.measures.dyadic import PairMean, pair_mean, within
from moescope.measures.similarity import centred, cosines, inner_products, row_cosines

Cells = dict[str, Float[np.ndarray, "experts others"]]
"""By column: `cosine_MATRIX`, `average_MATRIX` (cosine of the means of neurons), and the same of
`all`, the mean over matrices; within a layer also `centred_MATRIX`, `router`,
`centred_router`."""


def cells_across(one: LayerExperts, other: LayerExperts) -> Cells:
    """Every expert of one layer against every one of another; NaN where shapes differ."""
    first, second = one.summary, other.summary
    found: Cells = {}
    for name in (name for name in one.matrices if name in other.matrices):
        empty = np.full((len(first.experts), len(second.experts)), np.nan)
        found[f"cosine_{name}"] = found[f"average_{name}"] = empty
        if first.shape == second.shape:
            products = inner_products(one.matrices[name], other.matrices[name])
            found[f"cosine_{name}"] = cosines(
                products, first.squares[name], second.squares[name]
            ).numpy()
        if first.shape[1] == second.shape[1]:
            left, right = first.means[name], second.means[name]
            squares = left.square().sum(1), right.square().sum(1)
            found[f"average_{name}"] = cosines(left @ right.mT, *squares).numpy()
    return _with_all(found, ("cosine", "average"))


def cells_within(summary: Summary, products: dict[str, Tensor]) -> Cells:
    """Every expert of a layer against every other, and the same for their router rows.

    Args:
        summary: The layer.
        products: Inner products of its experts by matrix.
    """
    found: Cells = {}
    for name, square in summary.squares.items():
        found[f"cosine_{name}"] = cosines(products[name], square, square).numpy()
        found[f"average_{name}"] = row_cosines(summary.means[name]).numpy()
        found[f"centred_{name}"] = row_cosines(centred(summary.means[name])).numpy()
    found = _with_all(found, ("cosine", "average", "centred"))
    found["router"] = row_cosines(summary.router).numpy()
    found["centred_router"] = row_cosines(centred(summary.router)).numpy()
    return found


def _with_all(cells: Cells, measures: tuple[str, ...]) -> Cells:
    """Means over matrices beside them."""
    for measure in measures:
        every = [cell for name, cell in cells.items() if name.startswith(f"{measure}_")]
        cells[f"{measure}_{ALL}"] = np.mean(every, axis=0)
    return cells


def layer_rows(summary: Summary, cells: Cells) -> list[dict[str, Any]]:
    """Means over the pairs of a layer, by measure and matrix."""
    rows = []
    for measure in ("cosine", "average"):
        for matrix in (*summary.squares, ALL):
            values = within(cells[f"{measure}_{matrix}"])
            row = {**summary.place, "measure": measure, "matrix": matrix}
            rows.append(row | mean_columns(pair_mean(values, same=True)) | extremes(values))
            rows[-1] |= {"n_experts": len(summary.experts)}
    return rows


def between_row(one: Summary, other: Summary, cells: Cells) -> dict[str, Any]:
    """Two layers: the mean over their pairs, and how alike each expert's nearest is.

    `best` is the mean, over the experts of both, of the largest cosine with any of the other layer
    (with any other expert, of a layer with itself).
    """
    same = one is other
    every = cells[f"cosine_{ALL}"]
    values = within(every) if same else every
    mean = pair_mean(values, same=same)
    known = np.isfinite(values).any()
    apart = np.where(np.eye(len(every), dtype=bool), -np.inf, every) if same else every
    best = np.concatenate([apart.max(1), apart.max(0)]).mean() if known else np.nan
    row = {"stack": one.stack, "layer": one.layer}
    row |= {"other_stack": other.stack, "other_layer": other.layer}
    row |= (
        {name: cells[name][np.isfinite(values)].mean() for name in _means(cells)} if known else {}
    )
    row |= {"best": best} | mean_columns(mean)
    return row | {"status": row["status"] if known else _why(one, other)}


def _means(cells: Cells) -> list[str]:
    return [name for name in cells if name.startswith(("cosine_", "average_"))]


def _why(one: Summary, other: Summary) -> str:
    return "one_expert" if one is other else "other_shape"


def pair_frame(one: Summary, other: Summary, cells: Cells) -> pd.DataFrame:
    """One row per pair of experts; within a layer each pair once."""
    grid = np.ones((len(one.experts), len(other.experts)), dtype=bool)
    first, second = np.nonzero(np.triu(grid, 1) if one is other else grid)
    place = {"stack": one.stack, "layer": one.layer, "expert": np.array(one.experts)[first]}
    place |= {"other_stack": other.stack, "other_layer": other.layer}
    place |= {"other_expert": np.array(other.experts)[second]}
    return pd.DataFrame(place | {name: cell[first, second] for name, cell in cells.items()})


def mean_columns(found: PairMean) -> dict[str, Any]:
    """A mean over pairs with its limits, as columns."""
    status = "ok" if np.isfinite(found.low) else "few_experts"
    return found._asdict() | {"status": status if found.n_pairs else "one_expert"}


def extremes(values: Float[np.ndarray, "experts others"]) -> dict[str, float]:
    """The least and the most of all pairs."""
    present = values[np.isfinite(values)]
    if not len(present):
        return {"least": np.nan, "most": np.nan}
    return {"least": float(present.min()), "most": float(present.max())}
