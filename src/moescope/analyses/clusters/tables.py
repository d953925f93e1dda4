"""Tables of `clusters`."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
from scipy.cluster.hierarchy import leaves_list

from moescope.analyses.clusters.options import ClustersOptions
from moescope.analyses.clusters.sharing import Setting, Smaller
from moescope.analyses.clusters.tree import (
    cuts,
    dealt_silhouettes,
    labels_of,
    representatives,
    silhouettes,
    tree_of,
)
from moescope.analyses.fits import Fits
from moescope.analyses.likeness import Likeness, expert_parameters, tokens_by_expert
from moescope.analyses.loss_tables import loss_columns
from moescope.analyses.losses import by_domain
from moescope.evaluate.totals import Resampling


def cut_table(likeness: Likeness, options: ClustersOptions) -> pd.DataFrame:
    """One row per number of clusters: how good the cut is, and what it would let go.

    silhouette; null_mean and null_high, its mean and 95% quantile with the errors of each expert
    dealt out to the others (see `dealt_out`); p_value, of the best cut alone, of the largest
    silhouette over all cuts. could_go, experts that their cluster does not keep; fvu_median,
    fvu_worst of who stands in for them, on held-out documents; linear_median, that of linear maps
    for the same; better_than_linear, how many are better imitated by it than by their linear map.
    """
    distances = likeness.distances
    scores = silhouettes(distances)
    dealt = dealt_silhouettes(likeness.relative, options.permutations, options.seed)
    tree, size = tree_of(distances), len(likeness.experts)
    rows = []
    for i, clusters in enumerate(cuts(size)):
        kept = representatives(labels_of(tree, clusters), likeness.relative)
        going = np.nonzero(kept != np.arange(size))[0]
        fvu, linear = likeness.fvu[going, kept[going]], likeness.linear_fvu[going]
        rows.append(
            {
                "clusters": clusters,
                "silhouette": scores[i],
                "null_mean": dealt[:, i].mean(),
                "null_high": np.quantile(dealt[:, i], 0.95),
                "best": i == scores.argmax(),
                "could_go": len(going),
                "fvu_median": np.median(fvu),
                "fvu_worst": fvu.max(),
                "linear_median": np.median(linear),
                "better_than_linear": int((fvu < linear).sum()),
            }
        )
    table = pd.DataFrame(rows)
    beyond = (1 + (dealt.max(1) >= scores.max() - 1e-12).sum()) / (1 + len(dealt))
    return table.assign(
        p_value=np.where(table["best"], beyond, np.nan),
        n_experts=size,
        permutations=options.permutations,
        seed=options.seed,
    )


def member_table(fits: Fits, likeness: Likeness, clusters: int) -> pd.DataFrame:
    """One row per expert: its cluster at one cut, who stands in for it, and who is most like it.

    order is its place along the tree. nearest has the least relative error in its place, inside the
    training documents; nearest_fvu is measured on held-out ones.
    """
    tree = tree_of(likeness.distances)
    labels = labels_of(tree, clusters)
    kept = representatives(labels, likeness.relative)
    others = likeness.relative + np.diag(np.full(len(labels), np.inf))
    nearest = others.argmin(1)
    rows = np.arange(len(labels))
    used = tokens_by_expert(fits.tokens, likeness.experts, held_out=False)
    return pd.DataFrame(
        {
            "layer": [expert.layer for expert in likeness.experts],
            "expert": [expert.expert for expert in likeness.experts],
            "cluster": labels,
            "kept": [str(likeness.experts[k]) for k in kept],
            "order": _leaves(tree),
            "nearest": [str(likeness.experts[k]) for k in nearest],
            "nearest_relative": others[rows, nearest],
            "nearest_fvu": likeness.fvu[rows, nearest],
            "null": likeness.null,
            "linear_fvu": likeness.linear_fvu,
            "training_tokens": [used[expert] for expert in likeness.experts],
        }
    )


def pair_table(likeness: Likeness) -> pd.DataFrame:
    """One row per ordered pair: errors of the target in the place of the source."""
    rows, columns = np.nonzero(~np.eye(len(likeness.experts), dtype=bool))
    names = np.array([str(expert) for expert in likeness.experts])
    return pd.DataFrame(
        {
            "source": names[rows],
            "target": names[columns],
            "inner_fvu": likeness.inner_fvu[rows, columns],
            "relative": likeness.relative[rows, columns],
            "distance": likeness.distances[rows, columns],
            "fvu": likeness.fvu[rows, columns],
        }
    )


def shared_table(
    fits: Fits,
    likeness: Likeness,
    models: Mapping[Setting, Smaller],
    totals: Mapping[Setting, pd.DataFrame],
    resampling: Resampling,
) -> pd.DataFrame:
    """Loss and its rise by variant, size, draw and domain, beside the parameters of the experts."""
    whole = expert_parameters(fits.material.model, likeness.experts)
    rows = []
    for setting, sums in totals.items():
        smaller = models[setting]
        for domain, documents in by_domain(sums).items():
            row = setting._asdict() | {"experts": smaller.experts, "domain": domain}
            row |= {"parameters": smaller.parameters, "of_parameters": smaller.parameters / whole}
            rows.append(row | loss_columns(documents, resampling))
    return pd.DataFrame(rows)


def _leaves(tree: np.ndarray) -> np.ndarray:
    order = np.empty(len(tree) + 1, dtype=int)
    order[leaves_list(tree)] = np.arange(len(order))
    return order
