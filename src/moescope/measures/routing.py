"""How evenly, how decidedly and how differently tokens are routed. Counts in, numbers out."""

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray as Array

MATCHED_DRAWS = 5  # random matchings of token counts averaged in one divergence


def counts_by_document(
    experts: Int[Array, "tokens top_k"],
    documents: Int[Array, " tokens"],
    num_documents: int,
    num_experts: int,
) -> Int[Array, "documents experts"]:
    """Tokens of each document that have each expert in their top-k."""
    cells = documents[:, None] * num_experts + experts
    counts = np.bincount(cells.ravel(), minlength=num_documents * num_experts)
    return counts.reshape(num_documents, num_experts)


def entropy_bits(counts: Int[Array, "*rows experts"]) -> Float[Array, "*rows"]:
    """Shannon entropy of expert use in bits; `log2(experts)` is perfectly even."""
    return _entropy(counts / np.maximum(counts.sum(-1, keepdims=True), 1))


def router_entropy_bits(logits: Float[Array, "tokens experts"]) -> Float[Array, " tokens"]:
    """Entropy of the softmax over each token's router logits in bits."""
    shifted = logits - logits.max(-1, keepdims=True)
    weights = np.exp(shifted)
    return _entropy(weights / weights.sum(-1, keepdims=True))


def experts_for_share(counts: Int[Array, " experts"], share: float = 0.5) -> int:
    """Fewest experts that together take at least `share` of all routed (token, slot) pairs."""
    covered = np.sort(counts)[::-1].cumsum()
    return int(np.searchsorted(covered, share * covered[-1]) + 1)


def jensen_shannon_bits(
    p: Int[Array, "*rows experts"], q: Int[Array, "*rows experts"]
) -> Float[Array, "*rows"]:
    """Jensen-Shannon divergence of two count vectors in bits: 0 alike, 1 disjoint."""
    p = p / np.maximum(p.sum(-1, keepdims=True), 1)
    q = q / np.maximum(q.sum(-1, keepdims=True), 1)
    return np.asarray(_entropy((p + q) / 2) - (_entropy(p) + _entropy(q)) / 2)


def matched_divergence(
    p: Int[Array, " experts"],
    q: Int[Array, " experts"],
    random: np.random.Generator,
    draws: int = MATCHED_DRAWS,
) -> float:
    """Mean Jensen-Shannon divergence in bits after drawing both down to equal counts.

    The plug-in divergence grows as counts shrink, so that a small domain would look more special
    than a large one; both are drawn without replacement down to the smaller total.
    """
    size = min(p.sum(), q.sum())
    drawn = [random.multivariate_hypergeometric(side, size, size=draws) for side in (p, q)]
    return float(jensen_shannon_bits(*drawn).mean())


def divergence_test(
    counts: Int[Array, "documents experts"],
    in_second: Int[Array, " documents"],
    *,
    permutations: int,
    seed: int,
) -> tuple[float, Float[Array, " permutations"]]:
    """Divergence between two groups of documents, and the same with group labels shuffled.

    Args:
        counts: Routing counts of the documents of both groups.
        in_second: 1 for documents of the second group, 0 for the first.
        permutations: Shuffles of the labels; counts are matched inside each of them.
        seed: Seed of shuffles and matchings.

    Returns:
        Observed divergence in bits, and the divergences under shuffled labels.
    """
    random = np.random.default_rng(seed)
    total = counts.sum(0)

    def divergence(labels: Int[Array, " documents"]) -> float:
        second = labels @ counts
        return matched_divergence(total - second, second, random)

    observed = divergence(in_second)
    shuffled = [divergence(random.permutation(in_second)) for _ in range(permutations)]
    return observed, np.array(shuffled)


def _entropy(p: Float[Array, "*rows experts"]) -> Float[Array, "*rows"]:
    return np.asarray(-np.sum(p * np.log2(np.where(p > 0, p, 1)), axis=-1))
