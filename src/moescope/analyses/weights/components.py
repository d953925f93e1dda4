"""Principal components of the experts of a layer, and of all their neurons."""

from typing import Any

import numpy as np
import pandas as pd
import torch

from moescope.analyses.weights.pairs import Cells
from moescope.analyses.weights.reading import ALL, LayerExperts, Summary
from moescope.measures.similarity import components, dimensions, neuron_covariance

_SHARES = ("first_share", "second_share", "third_share")


def expert_positions(summary: Summary, cells: Cells) -> pd.DataFrame:
    """Coordinates of the experts on their first two components, each scaled to norm 1."""
    if len(summary.experts) < 3:
        return pd.DataFrame()
    places, shares = components(torch.from_numpy(cells[f"cosine_{ALL}"]))
    return pd.DataFrame(
        summary.place
        | {"expert": summary.experts, "first": places[:, 0], "second": places[:, 1]}
        | {"first_share": float(shares[0]), "second_share": float(shares[1])}
    )


def neuron_rows(experts: LayerExperts) -> list[dict[str, Any]]:
    """How the neurons of all experts spread over the hidden space, by matrix.

    `gaussian_dimensions` is what as many independent Gaussian neurons would spread over.
    """
    rows = []
    for name, matrices in experts.matrices.items():
        covariance = neuron_covariance(matrices)
        values = torch.linalg.eigvalsh(covariance).flip(0).numpy()
        hidden, points = len(values), sum(len(matrix) for matrix in matrices)
        shares = np.resize(values[: len(_SHARES)] / values.sum(), len(_SHARES))
        rows.append(
            {**experts.summary.place, "matrix": name}
            | dict(zip(_SHARES, shares.tolist(), strict=True))
            | {"dimensions": dimensions(covariance)}
            | {"gaussian_dimensions": hidden / (1 + hidden / points)}
            | {"hidden_size": hidden, "n_neurons": points}
        )
    return rows
