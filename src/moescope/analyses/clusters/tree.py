"""Clusters from distances: average linkage, cut into some clusters, and how good cuts are."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int
from scipy.cluster.hierarchy import cut_tree, linkage
from scipy.spatial.distance import squareform
from sklearn.metrics import silhouette_score

from moescope.analyses.likeness import distances_of

_MOST_CUTS = 64


def tree_of(distances: Float[np.ndarray, "experts experts"]) -> Float[np.ndarray, "merges 4"]:
    """Average linkage (UPGMA), as scipy writes it."""
    return np.asarray(linkage(squareform(distances, checks=False), "average"))


def labels_of(tree: Float[np.ndarray, "merges 4"], clusters: int) -> Int[np.ndarray, " experts"]:
    """The cluster of every expert, where the tree is cut into so many."""
    return np.asarray(cut_tree(tree, n_clusters=clusters)[:, 0])


def cuts(experts: int) -> list[int]:
    """Numbers of clusters that are looked at: all with a silhouette, or 64 of them, evenly."""
    even = np.linspace(2, experts - 1, min(_MOST_CUTS, experts - 2))
    return sorted({round(number) for number in even.tolist()})


def silhouettes(distances: Float[np.ndarray, "experts experts"]) -> Float[np.ndarray, " cuts"]:
    """Mean silhouette at every one of the `cuts` (Rousseeuw 1987)."""
    tree = tree_of(distances)
    scores = [
        silhouette_score(distances, labels_of(tree, clusters), metric="precomputed")
        for clusters in cuts(len(distances))
    ]
    return np.array(scores)


def best_cut(distances: Float[np.ndarray, "experts experts"]) -> int:
    """The number of clusters with the largest silhouette."""
    return cuts(len(distances))[int(silhouettes(distances).argmax())]


def dealt_out(
    relative: Float[np.ndarray, "experts experts"], random: np.random.Generator
) -> Float[np.ndarray, "experts experts"]:
    """Distances if no two experts were alike in particular.

    How easy an expert is to imitate, and how well it imitates, stay: their effects are those of the
    social relations model (Warner, Kenny and Stoto 1979), least squares without the diagonal. What
    they leave of the errors of a source is dealt out to the other experts at random.

    Args:
        relative: Relative errors, at least three experts, with zeros on the diagonal.
        random: What deals.
    """
    size, others = len(relative), ~np.eye(len(relative), dtype=bool)
    rows, columns = relative.sum(1), relative.sum(0)
    easy = ((size - 1) * rows + columns) / (size * (size - 2))
    good = ((size - 1) * columns + rows) / (size * (size - 2))
    good -= relative.sum() / ((size - 1) * (size - 2))
    expected, dealt = easy[:, None] + good, np.zeros_like(relative)
    left = (relative - expected)[others].reshape(size, -1)
    dealt[others] = expected[others] + random.permuted(left, axis=1).ravel()
    return distances_of(dealt.clip(min=0))


def dealt_silhouettes(
    relative: Float[np.ndarray, "experts experts"], permutations: int, seed: int
) -> Float[np.ndarray, "permutations cuts"]:
    """Silhouettes of distances dealt out at random: without any clusters."""
    random = np.random.default_rng(seed)
    return np.array([silhouettes(dealt_out(relative, random)) for _ in range(permutations)])


def representatives(
    labels: Int[np.ndarray, " experts"], relative: Float[np.ndarray, "experts experts"]
) -> Int[np.ndarray, " experts"]:
    """For every expert the one that its cluster keeps: which imitates the others best, on average.

    Args:
        labels: Cluster of every expert.
        relative: Relative errors, rows for the sources and columns for who stands in.
    """
    kept = np.empty_like(labels)
    for cluster in np.unique(labels):
        (members,) = np.nonzero(labels == cluster)
        errors = relative[np.ix_(members, members)].sum(0)
        kept[members] = members[int(errors.argmin())]
    return kept


def apart(
    distances: Float[np.ndarray, "experts experts"], groups: Sequence[int]
) -> Float[np.ndarray, "experts experts"]:
    """Distances with which no two groups are joined before each of them is one cluster."""
    same = np.equal.outer(groups, groups)
    return np.where(same, distances, distances.max() * len(distances) + 1.0)
