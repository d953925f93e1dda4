"""How alike experts are as matrices: all pairs at once, from inner products.

An expert's matrix is [neurons, hidden]: rows of gate and up, columns of down. Experts come as a
list of views of their layer, which is never copied whole: small parts of all of them are put side
by side in fp32, multiplied, and what these give is added up in fp64.
"""

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float, Float64
from torch import Tensor

Matrices = Sequence[Float[Tensor, "_ hidden"]]
"""Experts of one layer, alike in their neurons, which are rows."""

_VALUES_AT_ONCE = 1 << 19
"""Of all experts together: 2 MiB, as larger pieces that come and go leave memory in pieces."""
_ROWS_AT_ONCE = 128
"""Of one expert, where its sum is taken in double precision."""


def inner_products(one: Matrices, other: Matrices) -> Float64[Tensor, "experts others"]:
    """Inner product of every expert of one list with every one of the other: a Gram matrix."""
    turned = all(_is_turned(matrix) for matrix in (*one, *other))
    products = torch.zeros(len(one), len(other), dtype=torch.float64)
    if one is other:
        for part in _parts(one, turned):
            products += (part @ part.mT).double().cpu()
    else:
        for left, right in zip(_parts(one, turned), _parts(other, turned), strict=True):
            products += (left @ right.mT).double().cpu()
    return products


def squared_norms(experts: Matrices) -> Float64[Tensor, " experts"]:
    """Squared Frobenius norms."""
    turned = all(_is_turned(matrix) for matrix in experts)
    squares = torch.zeros(len(experts), dtype=torch.float64)
    for part in _parts(experts, turned):
        squares += part.square().sum(1).double().cpu()
    return squares


def cosines(
    products: Float64[Tensor, "experts others"],
    squares: Float64[Tensor, " experts"],
    other_squares: Float64[Tensor, " others"],
) -> Float64[Tensor, "experts others"]:
    """Cosines from inner products and squared norms, within -1 to 1; NaN for zeros."""
    norms = squares.sqrt()[:, None] * other_squares.sqrt()
    found = (products / norms).clamp(-1, 1)
    return torch.where(norms > 0, found, torch.nan)


def row_cosines(rows: Float64[Tensor, "experts hidden"]) -> Float64[Tensor, "experts experts"]:
    """Cosines of all pairs of rows."""
    products = rows @ rows.mT
    return cosines(products, products.diagonal(), products.diagonal())


def centred(rows: Float64[Tensor, "experts hidden"]) -> Float64[Tensor, "experts hidden"]:
    """Rows without what they have in common: their mean; zero where only rounding is left."""
    left = rows - rows.mean(0)
    rounding = 1e-12 * rows.norm(dim=1, keepdim=True)
    return torch.where(left.norm(dim=1, keepdim=True) > rounding, left, 0)


def neuron_means(experts: Matrices) -> Float64[Tensor, "experts hidden"]:
    """Mean over the neurons of each expert (A Closer Look into MoE, averaging)."""
    return torch.stack([_sum_of_rows(matrix) / len(matrix) for matrix in experts])


def _sum_of_rows(matrix: Float[Tensor, "neurons hidden"]) -> Float64[Tensor, " hidden"]:
    """In double precision a few rows at a time, as a whole copy would take twice the memory."""
    total = torch.zeros(matrix.shape[1], dtype=torch.float64)
    for rows in torch.split(matrix, _ROWS_AT_ONCE):
        total += rows.sum(0, dtype=torch.float64).cpu()
    return total


def components(
    products: Float64[Tensor, "experts experts"], count: int = 2
) -> tuple[Float64[Tensor, "experts count"], Float64[Tensor, " experts"]]:
    """Principal components of experts, from their inner products alone.

    Returns:
        Coordinates on the first components, and the share of the variance that each holds.
    """
    middle = products - products.mean(0) - products.mean(1, keepdim=True) + products.mean()
    values, vectors = torch.linalg.eigh(middle)
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
    return vectors[:, :count] * values[:count].sqrt(), values / values.sum()


def neuron_covariance(experts: Matrices) -> Float64[Tensor, "hidden hidden"]:
    """Covariance of the neurons of all experts together, as points in the hidden space."""
    hidden = experts[0].shape[1]
    products = torch.zeros(hidden, hidden, dtype=torch.float64)
    gram = torch.empty(hidden, hidden, device=experts[0].device)
    for matrix in experts:
        rows = matrix.float()
        products += torch.mm(rows.mT, rows, out=gram).cpu()
    total = torch.stack([_sum_of_rows(matrix) for matrix in experts]).sum(0)
    number = sum(len(matrix) for matrix in experts)
    return products.div_(number).addr_(total, total, alpha=-1 / number**2)


def dimensions(covariance: Float64[Tensor, "hidden hidden"]) -> float:
    """Over how many directions the variance spreads: `(sum of eigenvalues)^2 / sum of squares`.

    For `points` independent Gaussian ones about `hidden / (1 + hidden / points)`.
    """
    return float(covariance.trace().square() / covariance.square().sum())


def _is_turned(matrix: Tensor) -> bool:
    """Whether columns lie in one piece, not rows."""
    return matrix.stride(0) < matrix.stride(1)


def _parts(experts: Matrices, turned: bool) -> Iterator[Float[Tensor, "experts values"]]:
    """The same part of every expert, in the order in which it lies in memory.

    Each part takes the place of the one before it: allocating and gathering anew for every part
    takes as long as all products.
    """
    views = [matrix.mT for matrix in experts] if turned else experts
    rows, length = views[0].shape
    size = min(rows, max(1, _VALUES_AT_ONCE // (length * len(views))))
    room = torch.empty(len(views), size, length, device=views[0].device)
    for start in range(0, rows, size):
        part = room[:, : min(size, rows - start)]
        for place, view in zip(part, views, strict=True):
            place.copy_(view[start : start + size])
        yield part.flatten(1)
