"""How alike the outputs of all experts for a token are, and whether the router likes long ones.

Similarities are of tensors, wherever these are; what needs ranks is of arrays.
"""

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from numpy import ndarray as Array
from scipy.stats import rankdata
from torch import Tensor

KINDS = ("all", "both_chosen", "one_chosen", "none_chosen")
"""Pairs of experts of a token: any, or by how many of the two the token used."""


def token_cosines(
    outputs: Float[Tensor, "experts tokens hidden"],
) -> tuple[Float[Tensor, "tokens experts experts"], Float[Tensor, "tokens experts"]]:
    """Cosines of all pairs of experts for every token, and norms; NaN for outputs of zero."""
    rows = outputs.transpose(0, 1)
    products = rows @ rows.mT
    norms = products.diagonal(dim1=1, dim2=2).sqrt()
    both = norms[:, :, None] * norms[:, None]
    cosines = (products / both).clamp(-1, 1)
    return torch.where(both > 0, cosines, torch.nan), norms


def angular(cosines: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """`1 - acos / pi`: 1 for the same direction, 0.5 orthogonal, 0 opposite."""
    return 1 - cosines.clamp(-1, 1).acos() / torch.pi


def pair_means(
    values: Float[Tensor, "tokens experts experts"], chosen: Bool[Tensor, "tokens experts"]
) -> Float[Tensor, "kinds tokens"]:
    """Mean over the pairs of each of `KINDS`, for every token; NaN where it has no such pair.

    Args:
        values: A symmetric measure of pairs; NaN where there is none, diagonals are not read.
        chosen: The experts that each token used.
    """
    apart = ~torch.eye(values.shape[1], dtype=torch.bool, device=values.device)
    there = apart & values.isfinite()
    sides = torch.stack([chosen, ~chosen], dim=-1).to(values)
    sums, pairs = (
        sides.mT @ matrices @ sides
        for matrices in (values.masked_fill(~there, 0), there.to(values))
    )

    def by_kind(both: Tensor) -> Tensor:
        return torch.stack([both.sum((1, 2)), both[:, 0, 0], both[:, 0, 1], both[:, 1, 1]])

    return by_kind(sums) / by_kind(pairs)


def rank_correlations(
    one: Float[Array, "tokens experts"], other: Float[Array, "tokens experts"]
) -> Float[Array, " tokens"]:
    """Spearman's correlation over the experts of each token; NaN where all tie on one side."""
    one_ranks, other_ranks = _centred_ranks(one), _centred_ranks(other)
    squares = (one_ranks**2).sum(1) * (other_ranks**2).sum(1)
    products = (one_ranks * other_ranks).sum(1)
    return np.where(squares > 0, products / np.sqrt(np.where(squares > 0, squares, 1)), np.nan)


def longest_chosen(
    norms: Float[Array, "tokens experts"], chosen: Bool[Array, "tokens experts"]
) -> Float[Array, " tokens"]:
    """Whether the longest output of each token is that of an expert that it used.

    The share of them, if several are the longest; NaN where no expert was used.
    """
    longest = longest_share(norms)
    return np.where(chosen.any(1), (longest * chosen).sum(1), np.nan)


def longest_share(norms: Float[Array, "tokens experts"]) -> Float[Array, "tokens experts"]:
    """1 for the longest output of each token and 0 for the others; those that tie share the 1."""
    longest = norms == norms.max(1, keepdims=True)
    return np.asarray(longest / longest.sum(1, keepdims=True))


def rank_counts(
    scores: Float[Array, "tokens experts"], norms: Float[Array, "tokens experts"], *, seed: int
) -> Int64[Array, "score_ranks norm_ranks"]:
    """How often an expert has each rank of score and of norm within a token; from the smallest.

    Ties are broken at random.
    """
    random = np.random.default_rng(seed)
    number = scores.shape[1]
    score_ranks, norm_ranks = (
        np.lexsort((random.random(values.shape), values), axis=1).argsort(1)
        for values in (scores, norms)
    )
    counts = np.bincount((score_ranks * number + norm_ranks).ravel(), minlength=number**2)
    return counts.reshape(number, number)


def partial_rank_correlations(
    scores: Float[Array, "tokens experts"],
    norms: Float[Array, "tokens experts"],
    documents: Int64[Array, " tokens"],
) -> Float[Array, " estimates"]:
    """Correlation of the ranks of score and norm within tokens, given each expert's mean norm rank.

    Over all (token, expert) pairs. An expert that is long for every token, and chosen for
    whatever reason, adds nothing: what counts is where it is longer than it usually is.

    Args:
        scores: Of the router.
        norms: Of the outputs.
        documents: Document of every token, from 0 without gaps.

    Returns:
        The correlation, then that without each document in turn, as `jackknife.limits` takes
        them; NaN where nothing is left to correlate.
    """
    score_ranks, norm_ranks = _centred_ranks(scores), _centred_ranks(norms)
    products = [norm_ranks**2, norm_ranks * score_ranks, score_ranks**2]
    columns = [product.sum(1, keepdims=True) for product in products]
    columns += [norm_ranks, score_ranks, np.ones((len(scores), 1))]
    sums = np.zeros((documents.max(initial=-1) + 1, 4 + 2 * scores.shape[1]))
    np.add.at(sums, documents, np.concatenate(columns, axis=1))
    total = sums.sum(0)
    return _partial(np.concatenate([total[None], total - sums]))


@np.errstate(divide="ignore", invalid="ignore")  # nothing left
def _partial(sums: Float[Array, "estimates sums"]) -> Float[Array, " estimates"]:
    """From sums over tokens: of three products, of each expert's norm and score ranks, of ones."""
    norms_squared, products, scores_squared = sums[:, :3].T
    norms, scores = np.split(sums[:, 3:-1], 2, axis=1)
    # The mean norm rank m of an expert, summed over its tokens: of m x norm rank, which is that of
    # m x m too, and of m x score rank.
    shared = (norms**2).sum(1) / sums[:, -1]
    with_scores = (norms * scores).sum(1) / sums[:, -1]
    explained = np.where(shared > 0, with_scores**2 / shared, 0)
    left = (norms_squared - shared) * (scores_squared - explained)
    present = left > _NOTHING * norms_squared * scores_squared
    return np.where(present, (products - with_scores) / np.sqrt(left), np.nan)


_NOTHING = 1e-12
"""Share of the variance that rounding leaves where there is none."""


def _centred_ranks(values: Float[Array, "tokens experts"]) -> Float[Array, "tokens experts"]:
    """From the smallest, ties at the mean of their ranks; the mean rank is 0."""
    return np.asarray(rankdata(values, axis=1) - (values.shape[1] + 1) / 2)
