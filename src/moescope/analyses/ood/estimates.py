"""A ratio with what documents and adapters make it vary.

Of every domain a source expert has two adapters, trained on halves of its documents that share
none. Two adapters of one domain differ too: what domains differ by is more than that, or nothing.
"""

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from numpy import ndarray as Array
from scipy.special import stdtr, stdtrit

from moescope.measures.jackknife import GROUPS

Estimates = Float[Array, " estimates"]
"""A value of all, then without each of `GROUPS` groups of documents, then of each adapter alone."""
_LEVEL = 0.95


def estimates_of(rows: pd.DataFrame, group: pd.Series, value: str, over: str) -> Estimates:
    """The mean over source experts, and each adapter alone.

    Args:
        rows: source, half, document, and the two columns.
        group: Of each document.
        value: Column of the numerators.
        over: Column of the denominators.
    """
    means = [
        _ratios(own, group[own["document"]].to_numpy(), value, over)
        for _, own in rows.groupby("source")
    ]
    alone = rows.groupby(["source", "half"])[[value, over]].sum()
    return np.concatenate([np.mean(means, axis=0), alone[value] / alone[over]])


def limits(found: Estimates) -> tuple[float, float]:
    """95% limits."""
    error, degrees = _error(found)
    reach = stdtrit(degrees, (1 + _LEVEL) / 2) * error
    return float(found[0] - reach), float(found[0] + reach)


def p_value(found: Estimates) -> float:
    """Two-sided, by the error of the limits."""
    error, degrees = _error(found)
    if error == 0:
        return 0.0 if found[0] else 1.0
    return float(2 * stdtr(degrees, -abs(found[0]) / error))


def _ratios(
    rows: pd.DataFrame, group: Int[Array, " rows"], value: str, over: str
) -> Float[Array, " estimates"]:
    """Sum over sum, with and without each group of documents."""
    sums = np.zeros((GROUPS, 2))
    np.add.at(sums, group, rows[[value, over]].to_numpy(float))
    total = sums.sum(0)
    left = np.concatenate([total[None], total - sums])
    return np.asarray(left[:, 0] / left[:, 1])


def _error(found: Estimates) -> tuple[float, float]:
    """Standard error and its degrees of freedom (Satterthwaite 1946); source experts are given.

    What documents tested on make it vary (delete-one-group jackknife) and what the two adapters of
    each source expert differ by adds up: some of the first is in the second too.
    """
    rest, adapters = np.split(found[1:], [GROUPS])
    first, second = adapters.reshape(-1, 2).T
    degrees = np.array([GROUPS - 1, len(first)])
    parts = np.array(
        [
            degrees[0] / GROUPS * np.square(rest - rest.mean()).sum(),
            np.square(first - second).sum() / len(adapters) ** 2,
        ]
    )
    if not parts.sum():
        return 0.0, np.inf
    return float(np.sqrt(parts.sum())), float(parts.sum() ** 2 / (parts**2 / degrees).sum())
