"""Where an alignment's tensors lie: histograms and principal components (MoE Align, Figure 1)."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
from jaxtyping import Float
from sklearn.decomposition import PCA
from torch import Tensor

BINS = 60
TAIL = 0.001  # share of the values left out of the histogram on either side
SHOWN_ROWS = 300

Panels = Mapping[str, Float[Tensor, "tokens hidden"]]


def distributions(panels: Panels) -> pd.DataFrame:
    """Histogram of all values of each panel, with mean and standard deviation of all of them."""
    frames = []
    for panel, tensor in panels.items():
        if not len(tensor):
            continue
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
        if len(tensor) < 2:
            continue
        values = tensor[random.permutation(len(tensor))].double().numpy()
        fitted = PCA(2, svd_solver="covariance_eigh").fit(values)
        shown = fitted.transform(values[:SHOWN_ROWS])
        frame = {"panel": panel, "pc1": shown[:, 0], "pc2": shown[:, 1]}
        first, second = fitted.explained_variance_ratio_
        frames.append(pd.DataFrame(frame | {"explained1": first, "explained2": second}))
    return pd.concat(frames, ignore_index=True)
