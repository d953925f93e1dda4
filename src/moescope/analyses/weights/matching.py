"""Neurons of pairs of experts, matched, beside two nulls: Gaussian experts, scrambled ones."""

from functools import cache
from typing import Any

import numpy as np

from moescope.analyses.weights.options import WeightsOptions
from moescope.analyses.weights.pairs import mean_columns
from moescope.analyses.weights.reading import LayerExperts
from moescope.measures.dyadic import pair_mean
from moescope.measures.matching import Alike, gaussian_pairs, pairs_alike


def matching_rows(
    one: LayerExperts, other: LayerExperts, options: WeightsOptions
) -> list[dict[str, Any]]:
    """Means over the pairs that are matched, by measure, beside the null.

    Args:
        one: Experts of a layer.
        other: The same, or those of the next layer: with other matrices, or of another hidden
            size, there is nothing to match.
        options: How many pairs are matched.
    """
    if one.summary.shape[0] > other.summary.shape[0]:
        one, other = other, one
    first, second = one.summary, other.summary
    if first.shape[1] != second.shape[1] or one.matrices.keys() != other.matrices.keys():
        return []
    same = first is second
    pairs = _chosen(one, other, options)
    if not pairs:
        return []
    found = pairs_alike(one.matrices, other.matrices, pairs)
    some = pairs[:: max(1, len(pairs) // options.null_pairs)][: options.null_pairs]
    mixed = pairs_alike(one.matrices, other.matrices, some, scramble=options.seed)
    widths = (first.shape[0], second.shape[0])
    null = null_of(widths, first.shape[1], len(one.matrices), options.null_pairs, options.seed)
    rows = []
    for measure in Alike._fields:
        values = np.full((len(first.experts), len(second.experts)), np.nan)
        for pair, measured in zip(pairs, found, strict=True):
            values[pair] = getattr(measured, measure)
        rows.append(
            {**first.place, "other_stack": second.stack, "other_layer": second.layer}
            | {"apart": 0 if same else 1, "measure": measure}
            | mean_columns(pair_mean(values, same=same))
            | _null_columns("gaussian", null, measure)
            | _null_columns("scrambled", mixed, measure)
            | {"seed": options.seed}
        )
    return rows


def _null_columns(name: str, pairs: list[Alike], measure: str) -> dict[str, float]:
    """Mean and range over the pairs of a null."""
    drawn = np.array([getattr(pair, measure) for pair in pairs])
    return {
        f"{name}_mean": drawn.mean(),
        f"{name}_low": drawn.min(),
        f"{name}_high": drawn.max(),
        f"{name}_pairs": len(drawn),
    }


@cache
def null_of(
    neurons: tuple[int, int], hidden: int, matrices: int, draws: int, seed: int
) -> list[Alike]:
    """Pairs of Gaussian experts; layers of one shape share them."""
    return gaussian_pairs(neurons, hidden, matrices=matrices, draws=draws, seed=seed)


def _chosen(
    one: LayerExperts, other: LayerExperts, options: WeightsOptions
) -> list[tuple[int, int]]:
    """Pairs at random, or all if there are that few, in order."""
    same = one is other
    grid = np.ones((len(one.summary.experts), len(other.summary.experts)), dtype=bool)
    every = np.argwhere(np.triu(grid, 1) if same else grid)
    most = options.matched if same else options.matched_across
    place = (one.summary.layer, other.summary.layer)
    random = np.random.default_rng([options.seed, *place])
    some = random.permutation(len(every))[:most]
    return [(int(first), int(second)) for first, second in every[np.sort(some)]]
