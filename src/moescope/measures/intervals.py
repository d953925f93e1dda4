"""Intervals made of other intervals."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from numpy import ndarray as Array


class Estimate(NamedTuple):
    """Values with their 95% limits; NaN where there are none."""

    value: Float[Array, "*shape"]
    """The estimates."""
    low: Float[Array, "*shape"]
    """Lower limits."""
    high: Float[Array, "*shape"]
    """Upper limits."""


def difference(one: Estimate, other: Estimate) -> Estimate:
    """`other - one` of estimates that err independently, with 95% limits.

    Limits recovered from the spread of each side (Zou and Donner 2008, equations 6 and 7), which
    need not be symmetric. Where both sides were measured on the same text their errors mostly go
    together, and these limits are too wide.
    """
    value = other.value - one.value
    return Estimate(
        value,
        value - np.hypot(other.value - other.low, one.high - one.value),
        value + np.hypot(other.high - other.value, one.value - one.low),
    )


def mean(estimates: Estimate) -> Estimate:
    """The mean of [n] estimates that may err together: the means of values and limits.

    Too wide where errors are partly their own.
    """
    return Estimate(*(np.asarray(part.mean()) for part in estimates))
