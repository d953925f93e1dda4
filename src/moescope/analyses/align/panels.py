"""Where an alignment's tensors lie: histograms and principal components (MoE Align, Figure 1)."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Float
from sklearn.decomposition import PCA
from torch import Tensor

BINS = 60
TAIL = 0.001  # share of the values left out of the histogram on either side
SHOWN_ROWS = 300


@dataclass(frozen=True, kw_only=True, eq=False)
class Panel:
    """One tensor to look at."""

    layer: int
    """The model's own number of its layer."""
    name: str
    """What it is, in words."""
    values: Tensor
    """[tokens, hidden]."""


def distribution(panel: Panel) -> pd.DataFrame:
    """Histogram of all values, with mean and standard deviation of all of them."""
    values = _values(panel).ravel()
    if not len(values):
        return pd.DataFrame()
    low, high = np.quantile(values, [TAIL, 1 - TAIL])
    density, edges = np.histogram(values, BINS, (low, high), density=True)
    return pd.DataFrame(
        {
            "layer": panel.layer,
            "panel": panel.name,
            "bin_left": edges[:-1],
            "bin_right": edges[1:],
            "density": density,
            "mean": values.mean(),
            "std": values.std(),
            "n_tokens": len(panel.values),
        }
    )


def principal_components(panel: Panel, seed: int) -> pd.DataFrame:
    """First two principal components, of a random sample of the tokens."""
    if len(panel.values) < 2:
        return pd.DataFrame()
    values = np.random.default_rng(seed).permutation(_values(panel))
    fitted = PCA(2, svd_solver="covariance_eigh").fit(values)
    shown = fitted.transform(values[:SHOWN_ROWS])
    first, second = fitted.explained_variance_ratio_
    return pd.DataFrame(
        {
            "layer": panel.layer,
            "panel": panel.name,
            "pc1": shown[:, 0],
            "pc2": shown[:, 1],
            "explained1": first,
            "explained2": second,
        }
    )


def _values(panel: Panel) -> Float[np.ndarray, "tokens hidden"]:
    return np.asarray(panel.values.double())
