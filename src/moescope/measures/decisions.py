"""How decided a router is, and whether its choice follows from anything: tests for counts."""

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray as Array
from scipy.special import ndtr

from moescope.measures.expert_runs import used_by
from moescope.measures.routing import entropy_bits, jensen_shannon_bits


def margins(
    logits: Float[Array, "tokens experts"], experts: Int[Array, "tokens top_k"]
) -> Float[Array, " tokens"]:
    """Lowest logit of a chosen expert less the highest of one not chosen.

    Negative where something else than the logit decided, such as a bias or a limit of groups; NaN
    where all or none were chosen.
    """
    used = used_by(experts, logits.shape[1])
    chosen = np.where(used, logits, np.inf).min(1)
    others = np.where(used, -np.inf, logits).max(1)
    margin = chosen - others
    return np.asarray(np.where(np.isfinite(margin), margin, np.nan))


def mutual_information_bits(
    together: Int[Array, "*rows labels experts"],
) -> Float[Array, "*rows"]:
    """What a label says about the expert, from counts of both; biased upwards by few counts."""
    experts, labels = together.sum(-2), together.sum(-1)
    both = together.reshape(*together.shape[:-2], -1)
    return np.asarray(entropy_bits(experts) + entropy_bits(labels) - entropy_bits(both))


def paired_divergence_test(
    one: Int[Array, "documents experts"],
    other: Int[Array, "documents experts"],
    *,
    permutations: int,
    seed: int,
) -> tuple[float, Float[Array, " permutations"]]:
    """Divergence between two kinds of tokens of the same documents, beside swapped documents.

    Exact where each document has as many of the one kind as of the other: if the kinds do not
    matter, the two rows of a document might as well be exchanged.

    Args:
        one: Routing counts of the tokens of one kind.
        other: Those of the other kind.
        permutations: Times that every document is swapped or not, at random.
        seed: Seed of the swaps.

    Returns:
        Observed Jensen-Shannon divergence in bits, and the divergences under swaps.
    """
    random = np.random.default_rng(seed)
    swaps = random.integers(0, 2, size=(1 + permutations, len(one)))
    swaps[0] = 0
    moved = swaps.astype(float) @ (other - one)
    first, second = (
        np.rint(side).astype(np.int64) for side in (one.sum(0) + moved, other.sum(0) - moved)
    )
    divergences = jensen_shannon_bits(first, second)
    return float(divergences[0]), divergences[1:]


def common_excess_test(
    counts: Int[Array, "documents experts"],
    domain_of: Int[Array, " documents"],
    *,
    permutations: int,
    seed: int,
) -> tuple[Float[Array, " experts"], Int[Array, " experts"]]:
    """Which experts take more, or less, than an even part in every domain alike.

    Under the null, each document may prefer experts as much as it does, but which ones is its own
    affair: their names are shuffled anew in each document. An expert is as clear as in the domain
    where it is least clear, so one that is made for a domain is not flagged; the largest
    excess of any expert is what each is held against, so many experts do not add up.

    Returns:
        P-value and sign of the excess of each expert; 0 and a p-value of 1 where domains disagree.
    """
    random = np.random.default_rng(seed)
    p_values, signs = [], []
    for domain in np.unique(domain_of):
        excess = counts[domain_of == domain]
        excess = excess - excess.mean(1, keepdims=True)
        found, reached = excess.sum(0), np.zeros(counts.shape[1])
        for _ in range(permutations):
            largest = np.abs(random.permuted(excess, axis=1).sum(0)).max()
            # Equal but for rounding counts as reached.
            reached += largest >= np.abs(found) * (1 - 1e-9)
        p_values.append((1 + reached) / (1 + permutations))
        signs.append(np.sign(found).astype(int))
    agree = np.abs(np.sum(signs, 0)) == len(signs)
    return np.where(agree, np.max(p_values, 0), 1.0), np.where(agree, signs[0], 0)


def design_effect(
    counts: Int[Array, "documents experts"], tokens: Int[Array, " documents"]
) -> float:
    """How many times the variance of expert shares over documents is that of independent tokens.

    Over experts together, at least 1: n tokens say as much as `n / effect` independent ones (Kish
    1965).
    """
    share = counts.sum(0) / tokens.sum()
    residuals = counts - share * tokens[:, None]
    expected = tokens.sum() * (share * (1 - share)).sum()
    return max(1.0, float(np.square(residuals).sum() / expected)) if expected > 0 else 1.0


def zero_mean_p_value(sums: Float[Array, " documents"]) -> float:
    """Two-sided p-value of a total of independent sums that each have mean 0 under the null.

    Total over the root of the sum of squares, which is near normal whatever the spread of each sum
    (Efron 1969). The squares are around zero, the mean under the null, and not around the mean.
    """
    spread = float(np.sqrt(np.square(sums).sum()))
    return 2 * float(ndtr(-abs(sums.sum()) / spread)) if spread else 1.0
