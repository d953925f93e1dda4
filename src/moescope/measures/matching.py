"""How alike two experts are once their neurons may be put in another order, or turned.

The order of an expert's neurons means nothing: permuting rows of gate and up and columns of down
alike leaves its function. So one permutation is found for all three matrices together. Each of
them counts the same: scaled to the same norm, they lie side by side in `joined`, one row per
neuron, of norm 1 in all. One product of two such matrices then answers everything here.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64
from scipy.optimize import linear_sum_assignment
from scipy.stats import kendalltau
from torch import Tensor

from moescope.measures.similarity import Matrices


class Joined(NamedTuple):
    """One expert, ready to be compared."""

    rows: Float[Tensor, "neurons width"]
    """Its matrices side by side, fp32, each of squared norm 1 over their number."""
    means: Float[Tensor, " neurons"]
    """Mean of each row."""
    own: float
    """`||X X'||` of its centred rows X, for CKA."""


class Alike(NamedTuple):
    """What one pair of experts has in common."""

    in_order: float
    """Cosine, neuron i beside neuron i; NaN where the numbers of neurons differ."""
    matched: float
    """Cosine after the permutation that makes it largest."""
    tau: float
    """Kendall's tau of that permutation: 1 for none, about 0 for one at random."""
    procrustes: float
    """Cosine after the rotation of neurons that makes it largest; no permutation gives more."""
    cka: float
    """Linear CKA: 1 for equal up to a rotation and one scale of neurons."""


def joined(matrices: Sequence[Float[Tensor, "neurons hidden"]]) -> Joined:
    """An expert from its gate, if it has one, up and down."""
    scale = len(matrices) ** -0.5
    return _of_rows(torch.cat([m.float() * (scale / m.float().norm()) for m in matrices], dim=1))


def scrambled(expert: Joined, matrices: int, generator: torch.Generator) -> Joined:
    """The same expert in a space of its own: directions in another order, with random signs.

    Norms and angles of its neurons stay; what it shared with others is gone. The null for how much
    of a match is due to neurons of uneven size.
    """
    parts = []
    for part in expert.rows.chunk(matrices, dim=1):
        hidden = part.shape[1]
        order = torch.randperm(hidden, generator=generator).to(part.device)
        signs = torch.randint(2, (hidden,), generator=generator).to(part) * 2 - 1
        parts.append(part[:, order] * signs)
    return _of_rows(torch.cat(parts, dim=1))


def _of_rows(rows: Tensor) -> Joined:
    means = rows.mean(1)
    own = rows @ rows.mT - rows.shape[1] * torch.outer(means, means)
    return Joined(rows, means, float(own.norm()))


def alike(one: Joined, other: Joined) -> Alike:
    """Everything about one pair; `one` has at most as many neurons as `other`.

    Matching is the assignment problem, solved exactly (Crouse 2016, as in scipy); orthogonal
    Procrustes is the sum of singular values of the product (Schoenemann 1966); linear CKA is that
    of Kornblith et al. 2019 (arXiv 1905.00414, eq. 4) with neurons as features and the directions
    that they read and write as samples.
    """
    products = one.rows @ other.rows.mT
    order = matching(products)
    chosen = torch.from_numpy(order).to(products.device)
    norm = other.rows[chosen].norm()
    centred = products - one.rows.shape[1] * torch.outer(one.means, other.means)
    square = len(one.rows) == len(other.rows)
    return Alike(
        in_order=float(products.diagonal().double().sum()) if square else float("nan"),
        matched=float(products.gather(1, chosen[:, None]).double().sum() / norm),
        tau=permutation_tau(order),
        procrustes=float(torch.linalg.svdvals(products).double().sum()),
        cka=float(centred.double().square().sum() / (one.own * other.own)),
    )


def matching(products: Float[Tensor, "neurons others"]) -> Int64[np.ndarray, " neurons"]:
    """The neuron of the other expert for each of one, so that their products sum to the most."""
    best = products.argmax(1).cpu().numpy()
    if len(np.unique(best)) == len(best):  # every neuron has its favourite
        return np.asarray(best)
    return np.asarray(linear_sum_assignment(products.cpu().numpy(), maximize=True)[1])


def permutation_tau(order: Int64[np.ndarray, " neurons"]) -> float:
    """Kendall's tau between a permutation and none; NaN for one neuron."""
    return float(kendalltau(np.arange(len(order)), order).statistic) if len(order) > 1 else np.nan


def gaussian_pairs(
    neurons: tuple[int, int], hidden: int, *, matrices: int, draws: int, seed: int
) -> list[Alike]:
    """The same of pairs of independent Gaussian experts of these shapes: the null."""
    generator = torch.Generator().manual_seed(seed)

    def expert(wide: int) -> Joined:
        shape = (matrices, wide, hidden)
        return joined(list(torch.randn(shape, generator=generator)))

    return [alike(*(expert(wide) for wide in neurons)) for _ in range(draws)]


def pairs_alike(
    one: Mapping[str, Matrices],
    other: Mapping[str, Matrices],
    pairs: Sequence[tuple[int, int]],
    *,
    scramble: int | None = None,
) -> list[Alike]:
    """What pairs of experts have in common, the one of a first layer, the other of a second.

    Args:
        one: Experts of a layer by matrix, at most as wide as those of `other`.
        other: Those of the other layer, or of the same.
        pairs: Numbers of experts.
        scramble: A seed, to have the second of each pair `scrambled`.
    """
    generator = None if scramble is None else torch.Generator().manual_seed(scramble)
    found = []
    held: tuple[int, Joined] | None = None
    for first, second in pairs:
        if held is None or held[0] != first:
            held = first, joined([experts[first] for experts in one.values()])
        right = joined([experts[second] for experts in other.values()])
        right = right if generator is None else scrambled(right, len(other), generator)
        found.append(alike(held[1], right))
    return found
