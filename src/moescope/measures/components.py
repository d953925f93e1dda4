"""Where vectors of several groups lie: principal components, and variance between groups."""

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray as Array


def principal_components(
    x: Float[Array, "samples dimensions"], number: int = 2
) -> tuple[Float[Array, "samples number"], Float[Array, " number"]]:
    """Coordinates along the directions of the largest variance, and their parts of the variance.

    The largest loading of each direction is positive. Zeros where there are fewer directions.
    """
    centred = x - x.mean(0)
    left, scales, right = np.linalg.svd(centred, full_matrices=False)
    signs = np.sign(right[np.arange(len(right)), np.abs(right).argmax(1)])
    found = min(number, len(scales))
    coordinates, parts = np.zeros((len(x), number)), np.zeros(number)
    coordinates[:, :found] = (left * scales * signs)[:, :found]
    parts[:found] = (scales**2 / max(np.square(scales).sum(), np.finfo(float).tiny))[:found]
    return coordinates, parts


def variance_between(
    x: Float[Array, "samples dimensions"],
    group_of: Int[Array, " units"],
    unit_of: Int[Array, " samples"],
    *,
    permutations: int,
    seed: int,
) -> tuple[float, Float[Array, " permutations"]]:
    """Part of the variance that lies between the means of groups, and the same under shuffles.

    Args:
        x: Vectors.
        group_of: Group of every unit; units are what is shuffled, such as documents.
        unit_of: Unit of every vector.
        permutations: Shuffles of the groups of the units.
        seed: Seed of the shuffles.

    Returns:
        Between 0 and 1 (eta squared, over all dimensions), and the values under shuffles.
    """
    centred = x - x.mean(0)
    sums = np.zeros((len(group_of), x.shape[1]))
    np.add.at(sums, unit_of, centred)
    sizes = np.bincount(unit_of, minlength=len(group_of)).astype(float)
    groups = np.tile(group_of, (1 + permutations, 1))
    np.random.default_rng(seed).permuted(groups[1:], axis=1, out=groups[1:])
    between = np.zeros(len(groups))
    for group in np.unique(group_of):
        inside = (groups == group).astype(float)
        between += np.square(inside @ sums).sum(1) / np.maximum(inside @ sizes, 1)
    parts = between / max(float(np.square(centred).sum()), np.finfo(float).tiny)
    return float(parts[0]), parts[1:]
