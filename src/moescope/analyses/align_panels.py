"""Where an alignment's tensors lie: histograms and principal components (MoE Align, Figure 1)."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
from jaxtyping import Float
from sklearn.decomposition import PCA
from torch import Tensor

BINS = 60
TAIL = 0.001  # share of the values left out of the histogram on either side
FITTED_ROWS = 5_000
SHOWN_ROWS = 300

Panels = Mapping[str, Float[Tensor, "tokens hidden"]]


def distributions(panels: Panels) -> pd.DataFrame:
    """Histogram of all values of each panel, with mean and standard deviation of all of them."""
    frames = []
    for panel, tensor in panels.items():
        values = tensor.double().numpy().ravel()
        low, high = np.quantile(values, [TAIL, 1 - TAIL])
        density, edges = np.histogram(values, BINS, (low, high), density=True)
        frames.append(
            pd.DataFrame(
                {
                    "panel": panel,
                    "bin_left": edges[:-1],
                    "bin_right": edges[1:],
                    "density": density,
                    "mean": values.mean(),
                    "std": values.std(),
                    "n_tokens": len(tensor),
                }
            )
        )
    return pd.concat(frames, ignore_index=True)


def principal_components(panels: Panels, seed: int) -> pd.DataFrame:
    """First two principal components of a random sample of each panel, fitted to each alone."""
    random = np.random.default_rng(seed)
    frames = []
    for panel, tensor in panels.items():
        rows = random.permutation(len(tensor))[:FITTED_ROWS]
        values = tensor[rows].double().numpy()
        components = min(2, *values.shape)
        fitted = PCA(components, svd_solver="covariance_eigh").fit(values)
        shown = np.zeros((min(len(values), SHOWN_ROWS), 2))
        shown[:, :components] = fitted.transform(values[:SHOWN_ROWS])
        explained = np.zeros(2)
        explained[:components] = fitted.explained_variance_ratio_
        frame = {"panel": panel, "pc1": shown[:, 0], "pc2": shown[:, 1]}
        frames.append(
            pd.DataFrame(frame | {"explained1": explained[0], "explained2": explained[1]})
        )
    return pd.concat(frames, ignore_index=True)
