"""P-values of several tests at once."""

from itertools import accumulate

import numpy as np
from jaxtyping import Float
from numpy import ndarray as Array


def holm(p_values: Float[Array, " tests"]) -> Float[Array, " tests"]:
    """P-values after Holm's correction (1979), in the order given; NaN is no test and stays."""
    corrected = np.full_like(p_values, np.nan)
    (tested,) = np.nonzero(~np.isnan(p_values))
    order = tested[np.argsort(p_values[tested], kind="stable")]
    stepped = p_values[order] * np.arange(len(order), 0, -1)
    corrected[order] = np.minimum(1.0, list(accumulate(stepped, max)))
    return corrected
