"""Whether the same clusters come out of other documents, other seeds, and random experts."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
from jaxtyping import Bool
from sklearn.metrics import adjusted_rand_score
from torch import Tensor

from moescope.analyses.align.tokens import Tokens, held_out_documents
from moescope.analyses.clusters.options import ClustersOptions
from moescope.analyses.clusters.tree import best_cut, dealt_out, labels_of, tree_of
from moescope.analyses.fits import Fits, Source
from moescope.analyses.likeness import FEWEST, Likeness

OTHER_DOCUMENTS, OTHER_SEED, RANDOM = "other documents", "other seed", "random experts"
"""What clusterings are compared with."""
_COLUMNS = [
    "comparison",
    "draw",
    "clusters",
    "chosen",
    "ari",
    "null_mean",
    "null_high",
    "p_value",
    "n_experts",
    "seed",
]


def stability_table(fits: Fits, likeness: Likeness, options: ClustersOptions) -> pd.DataFrame:
    """How alike clusterings of the same experts are, for every number of clusters.

    The training documents are split in two. Distances from the first half are clustered, and

    - those from the second half (other documents);
    - those from the second half with random experts in the place of all targets: what is alike
      then is due to the sources, how easy they are, and to output spaces, not to likeness;
    - and those from all training documents, with two seeds of the fits (other seed).

    Returns:
        One row per comparison, draw (of random experts) and number of clusters. ari, the adjusted
        Rand index of the two clusterings; null_mean and null_high, its mean and 95% quantile with
        the errors of each expert dealt out to the others in one of them (see `dealt_out`); p_value;
        chosen, whether the first of the two has its largest silhouette there; n_experts, seed.
    """
    experts = drawn_evenly(likeness.experts, options.stability_experts, options.seed)
    if len(experts) < FEWEST:
        return pd.DataFrame(columns=_COLUMNS)
    one, other = (replace(fits, tokens=half) for half in halves(fits.tokens))
    first, second = (Likeness.of(half, experts, fewest=0) for half in (one, other))
    reseeded = replace(fits, options=replace(fits.options, seed=fits.options.seed + 1))
    rows = list(_compared(first, second, OTHER_DOCUMENTS, 0, options))
    again = Likeness.of(reseeded, experts, fewest=0)
    rows += _compared(likeness.part(experts), again, OTHER_SEED, 0, options)
    for draw in range(options.random):
        random = Likeness.of(other, experts, draw, fewest=0)
        rows += _compared(first, random, RANDOM, draw, options)
    return pd.DataFrame(rows, columns=_COLUMNS)


def halves(tokens: Tokens) -> tuple[Tokens, Tokens]:
    """Disjoint halves of the training documents of every domain; all others count as held out.

    Twice as many tokens of an expert are drawn, so that as many as before are trained on.
    """
    part = held_out_documents(tokens.capture, 0.5, tokens.seed + 1)

    def without(documents: Bool[Tensor, " documents"]) -> Tokens:
        return replace(tokens, held_out=tokens.held_out | documents, most=2 * tokens.most)

    return without(part), without(~part)


def drawn_evenly(experts: Sequence[Source], most: int, seed: int) -> list[Source]:
    """At most so many, in turns one of each layer, at random within it; in their order."""
    random = np.random.default_rng(seed)
    turns = list[tuple[int, int, Source]]()
    for layer in sorted({expert.layer for expert in experts}):
        own = [expert for expert in experts if expert.layer == layer]
        turns += [(turn, layer, own[i]) for turn, i in enumerate(random.permutation(len(own)))]
    return sorted(expert for _, _, expert in sorted(turns)[:most])


def _compared(
    one: Likeness, other: Likeness, comparison: str, draw: int, options: ClustersOptions
) -> Iterator[dict[str, object]]:
    """Over the numbers of clusters, with experts that both have."""
    both = [expert for expert in one.experts if expert in other.experts]
    if len(both) < FEWEST:
        return
    one, other = one.part(both), other.part(both)
    trees, best = (tree_of(one.distances), tree_of(other.distances)), best_cut(one.distances)
    random = np.random.default_rng(options.seed)
    dealt = [tree_of(dealt_out(other.relative, random)) for _ in range(options.permutations)]
    for clusters in range(2, len(both)):
        labels, *others = (labels_of(tree, clusters) for tree in (*trees, *dealt))
        ari, *null = (adjusted_rand_score(labels, other) for other in others)
        yield {
            "comparison": comparison,
            "draw": draw,
            "clusters": clusters,
            "chosen": clusters == best,
            "ari": ari,
            "null_mean": np.mean(null),
            "null_high": np.quantile(null, 0.95),
            "p_value": (1 + (np.array(null) >= ari - 1e-12).sum()) / (1 + len(null)),
            "n_experts": len(both),
            "seed": options.seed,
        }
