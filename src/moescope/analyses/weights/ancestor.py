"""Experts against the feed-forward layers of a dense model that they may descend from."""

from typing import Any

import numpy as np

from moescope.analyses.weights.matching import null_of
from moescope.analyses.weights.options import WeightsOptions
from moescope.analyses.weights.pairs import cells_across
from moescope.analyses.weights.reading import ALL, LayerExperts, reading
from moescope.measures.matching import pairs_alike
from moescope.models.on_disk import StoredLayers


def ancestor_rows(
    experts: LayerExperts, ancestor: StoredLayers, options: WeightsOptions
) -> list[dict[str, Any]]:
    """One row per expert: how like the ancestor's layer of the same number it is.

    `cosine_MATRIX` takes the neurons in their order. `matched` is the cosine with the neurons of
    the ancestor that fit best, each used once: of an expert with fewer neurons, with its best
    part.
    """
    summary = experts.summary
    place = (summary.stack, summary.layer)
    found = next((la for la in ancestor.layers if (la.stack, la.index) == place), None)
    if found is None:
        return [_row(experts, number, "no_such_layer") for number in summary.experts]
    with reading(ancestor, found) as dense:
        fits = (
            dense.matrices.keys() == experts.matrices.keys()
            and dense.summary.shape[1] == summary.shape[1]
        )
        if not fits:
            return [_row(experts, number, "other_shape") for number in summary.experts]
        cells = cells_across(experts, dense)
        wider = summary.shape[0] > dense.summary.shape[0]
        numbers = range(len(summary.experts))
        if wider:
            alike = pairs_alike(dense.matrices, experts.matrices, [(0, n) for n in numbers])
        else:
            alike = pairs_alike(experts.matrices, dense.matrices, [(n, 0) for n in numbers])
    widths = sorted((summary.shape[0], dense.summary.shape[0]))
    null = null_of(
        (widths[0], widths[1]),
        summary.shape[1],
        len(experts.matrices),
        options.null_pairs,
        options.seed,
    )
    drawn = np.array([pair.matched for pair in null])
    return [
        _row(experts, number, "ok")
        | {f"cosine_{name}": cells[f"cosine_{name}"][n, 0] for name in (*experts.matrices, ALL)}
        | {"matched": alike[n].matched, "tau": alike[n].tau, "cka": alike[n].cka}
        | {"gaussian_matched": drawn.mean(), "gaussian_pairs": len(drawn)}
        for n, number in enumerate(summary.experts)
    ]


def _row(experts: LayerExperts, number: int, status: str) -> dict[str, Any]:
    return {**experts.summary.place, "expert": number, "status": status}
