"""How evenly, how decidedly and how differently tokens are routed. Counts in, numbers out."""

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray as Array

_NO_WEIGHT = -1e3  # a logit so far below the largest has a weight of exactly 0


def count_experts(
    counts: Int[Array, "rows experts"],
    rows: Int[Array, " tokens"],
    experts: Int[Array, "tokens top_k"],
) -> None:
    """Add the experts of every token to its row of `counts`, in place.

    Args:
        counts: Tokens of each row, such as a document, that have each expert in their top-k.
        rows: Row of every token.
        experts: Experts of every token; -1 in an unused slot.
    """
    cells = rows[:, None] * counts.shape[1] + experts
    if experts.min(initial=0) < 0:
        cells = cells[experts >= 0]
    # Of the same dtype: with another one, numpy takes twenty times as long.
    np.add.at(counts.reshape(-1), cells.reshape(-1), counts.dtype.type(1))


def entropy_bits(counts: Int[Array, "*rows experts"]) -> Float[Array, "*rows"]:
    """Shannon entropy of expert use in bits; `log2(experts)` is perfectly even."""
    return _entropy(counts / np.maximum(counts.sum(-1, keepdims=True), 1))


def router_entropy_bits(logits: Float[Array, "tokens experts"]) -> Float[Array, " tokens"]:
    """Entropy of the softmax over each token's router logits in bits."""
    shifted = np.maximum(logits - logits.max(-1, keepdims=True), _NO_WEIGHT)
    weights = np.exp(shifted)
    total = weights.sum(-1)
    nats = np.log(total) - np.einsum("te,te->t", weights, shifted) / total
    return np.asarray(nats / np.log(2))


def experts_for_share(counts: Int[Array, " experts"], share: float = 0.5) -> int:
    """Fewest experts that together take at least `share` of all routed (token, slot) pairs."""
    covered = np.sort(counts)[::-1].cumsum()
    return int(np.searchsorted(covered, share * covered[-1]) + 1)


def busiest_share(counts: Int[Array, "*rows experts"], number: int) -> Float[Array, "*rows"]:
    """Part of all routed (token, slot) pairs that goes to the `number` busiest experts."""
    busiest = np.sort(counts, axis=-1)[..., -number:].sum(-1)
    return np.asarray(busiest / np.maximum(counts.sum(-1), 1))


def jensen_shannon_bits(
    p: Int[Array, "*rows experts"], q: Int[Array, "*rows experts"]
) -> Float[Array, "*rows"]:
    """Jensen-Shannon divergence of two count vectors in bits: 0 alike, 1 disjoint."""
    p = p / np.maximum(p.sum(-1, keepdims=True), 1)
    q = q / np.maximum(q.sum(-1, keepdims=True), 1)
    return np.asarray(_entropy((p + q) / 2) - (_entropy(p) + _entropy(q)) / 2)


def matched_divergence(
    p: Int[Array, "*rows experts"], q: Int[Array, "*rows experts"], random: np.random.Generator
) -> Float[Array, "*rows"]:
    """Jensen-Shannon divergence in bits after drawing all counts down to `matched_size`.

    The plug-in divergence grows as counts shrink, so that a small domain would look more special
    than a large one, and domains of short documents more than shuffled ones, which are larger.
    Both sides of all rows are drawn, without replacement, down to one and the same total.
    """
    size = np.full(p.shape[:-1], matched_size(p, q))
    return jensen_shannon_bits(_drawn_down(p, size, random), _drawn_down(q, size, random))


def matched_size(p: Int[Array, "*rows experts"], q: Int[Array, "*rows experts"]) -> int:
    """The smallest total of any row of either side."""
    return int(min(p.sum(-1).min(), q.sum(-1).min()))


def _drawn_down(
    counts: Int[Array, "*rows experts"], size: Int[Array, "*rows"], random: np.random.Generator
) -> Int[Array, "*rows experts"]:
    """Draw `size` of the counted things of each row without replacement.

    One expert after the other, given what the former ones got: the multivariate hypergeometric
    distribution, for all rows at once.
    """
    drawn = np.empty_like(counts)
    rest, wanted = counts.sum(-1), size
    for expert in range(counts.shape[-1] - 1):
        rest = rest - counts[..., expert]
        drawn[..., expert] = random.hypergeometric(counts[..., expert], rest, wanted)
        wanted = wanted - drawn[..., expert]
    drawn[..., -1] = wanted
    return drawn


def divergence_test(
    counts: Int[Array, "documents experts"],
    in_second: Int[Array, " documents"],
    *,
    permutations: int,
    seed: int,
) -> tuple[float, Float[Array, " permutations"], int]:
    """Divergence between two groups of documents, and the same with group labels shuffled.

    Args:
        counts: Routing counts of the documents of both groups.
        in_second: 1 for documents of the second group, 0 for the first.
        permutations: Shuffles of the labels. Counts are matched between the groups and over all
            shuffles, so that it is not the documents' sizes that decide.
        seed: Seed of shuffles and matchings.

    Returns:
        Observed divergence in bits, the divergences under shuffled labels, and the total that all
        counts were drawn down to.
    """
    random = np.random.default_rng(seed)
    labels = np.tile(in_second.astype(float), (1 + permutations, 1))
    random.permuted(labels[1:], axis=1, out=labels[1:])
    second = (labels @ counts).astype(np.int64)
    first = counts.sum(0) - second
    divergences = matched_divergence(first, second, random)
    return float(divergences[0]), divergences[1:], matched_size(first, second)


def _entropy(p: Float[Array, "*rows experts"]) -> Float[Array, "*rows"]:
    return np.asarray(-np.sum(p * np.log2(np.where(p > 0, p, 1)), axis=-1))
