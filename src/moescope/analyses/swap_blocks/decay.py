"""Whether swaps of layers further apart change more."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from numpy import ndarray as Array
from scipy.stats import rankdata

from moescope.analyses.swap_blocks.options import SwapOptions
from moescope.analyses.swap_blocks.passes import Swaps
from moescope.analyses.swap_blocks.routing import left_out_divergences
from moescope.analyses.swap_blocks.tables import SIGN, measures_of, resampling_of
from moescope.captures.places import Place
from moescope.evaluate.totals import difference_columns
from moescope.measures.dyadic import mantel
from moescope.measures.jackknife import limits
from moescope.measures.multiple_tests import holm

_PERMUTATIONS = 1_000


def decay_table(swaps: Swaps, options: SwapOptions) -> pd.DataFrame:
    """Change against the distance of the two layers.

    Returns:
        One row per measure (accuracy: how much is lost; loss: how much it rises; routing, of swaps
        in an encoder: mean divergence in bits over the layers of the decoder): slope, by least
        squares over the swaps, per layer of distance, with 95% limits over documents or questions
        (NaN under 30); rank_correlation with the distance over pairs of layers, and p_value, the
        share of permutations of the layers with one as far from 0 (Mantel 1967), since pairs that
        share a layer are not independent; p_corrected, by Holm for the number of measures;
        n_swaps, n_layers. Empty where no two distances differ.
    """
    pairs = [swap.places for swap in swaps.measured]
    distances = np.array([float(abs(one.layer - other.layer)) for one, other in pairs])
    if len(set(distances)) < 2:
        return pd.DataFrame()
    centred = distances - distances.mean()
    weights = centred / np.square(centred).sum()
    rows = []
    for measure in measures_of(swaps):
        harm = _harm(swaps, measure)
        frame = pd.DataFrame({"slope": harm @ weights})
        frame["tokens"] = swaps.baseline.units.get("tokens", 1.0)
        slope = difference_columns(frame, "slope", resampling_of(options))
        rows.append({"measure": measure} | slope | _ranks(swaps, harm.sum(0), options.seed))
    decoder = [place for place in swaps.baseline.counts if place.stack == "decoder"]
    if pairs[0][0].stack == "encoder" and decoder:
        moved = _moved(swaps, decoder)
        low, high = limits(moved @ weights)
        slope = {"slope": moved[0] @ weights, "slope_low": float(low), "slope_high": float(high)}
        rows.append({"measure": "routing"} | slope | _ranks(swaps, moved[0], options.seed))
    table = pd.DataFrame(rows)
    return table.assign(p_corrected=holm(table["p_value"].to_numpy(dtype=float)))


def _harm(swaps: Swaps, measure: str) -> Float[Array, "units swaps"]:
    """How much each document or question is the worse for each swap."""
    column = "exact" if measure == "accuracy" else measure
    before = swaps.baseline.units[column].to_numpy(dtype=float)
    after = [found.units[column].to_numpy(dtype=float) for found in swaps.measured.values()]
    change: Float[Array, "units swaps"] = np.stack(after, axis=1) - before[:, None]
    return SIGN[measure] * change


def _moved(swaps: Swaps, places: Sequence[Place]) -> Float[Array, "estimates swaps"]:
    """Mean divergence over some layers."""
    found = [
        [left_out_divergences(swaps.baseline, swap, measured, place) for place in places]
        for swap, measured in swaps.measured.items()
    ]
    mean: Float[Array, "estimates swaps"] = np.mean(found, axis=1).T
    return mean


def _ranks(swaps: Swaps, harm: Float[Array, " swaps"], seed: int) -> dict[str, Any]:
    """Rank correlation over pairs of layers, tested by permuting layers."""
    pairs = [swap.places for swap in swaps.measured]
    layers = sorted({place for pair in pairs for place in pair})
    size = len(layers)
    about = {"n_swaps": len(pairs), "n_layers": size}
    different = {frozenset(pair) for pair in pairs if pair[0] != pair[1]}
    each_once = len(different) == len(pairs) == size * (size - 1) // 2
    if not each_once or not np.isfinite(harm).all():
        return {"rank_correlation": np.nan, "p_value": np.nan} | about
    matrices = np.zeros((2, size, size))
    rows, columns = np.array([[layers.index(place) for place in pair] for pair in pairs]).T
    distances = np.array([abs(one.layer - other.layer) for one, other in pairs])
    matrices[:, rows, columns] = rankdata(distances), rankdata(harm)
    matrices += matrices.transpose(0, 2, 1)
    tested = mantel(*matrices, permutations=_PERMUTATIONS, seed=seed)
    return {"rank_correlation": tested.r, "p_value": tested.p_value} | about
