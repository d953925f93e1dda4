"""Figures of the analysis `align`: which experts of one layer others can imitate."""

import pandas as pd

from moescope.reports.figures import (
    align_curves,
    align_distributions,
    align_fits,
    align_layers,
    align_matrices,
)
from moescope.reports.figures.align_pairs import measured, several_layers
from moescope.reports.registry import Figure, figures
from moescope.runs import Result

COLUMNS = {
    "source_layer, source_expert": "The expert f that is to be imitated.",
    "target_layer, target_expert": "The expert g that imitates it behind a trained adapter A.",
    "n_train, n_val": "Tokens for fitting, and held out.",
    "n_documents": "Documents behind the held-out tokens and the intervals.",
    "mse_mean, mse_sum": "Held-out squared error of g(A(x)), averaged or summed over dimensions.",
    "published_mse": "Training error of the published protocol: 10 Adam steps on the same tokens.",
    "fvu": "Fraction of variance unexplained on held-out tokens: 0 is perfect, 1 is the mean.",
    "fvu_low, fvu_high": "95% interval of fvu, over documents.",
    "kl_before, kl_after": "Gaussian KL divergence between the inputs that g has in its own layer "
    "and x, or A(x).",
    "mmd_before, mmd_after": "The same, as squared maximum mean discrepancy.",
    "cosine": "Mean cosine between g(A(x)) and f(x).",
    "token_error": "Median over tokens of the relative error.",
    "fvu_constant": "fvu of an adapter that ignores its input.",
    "fvu_identity": "fvu without any adapter.",
    "fvu_linear": "fvu of a ridge regression from x to f(x), without any expert.",
    "fvu_random, fvu_random_sd": "Mean and spread of fvu when g is a random expert.",
    "fvu_random_down, fvu_random_all": "The same by kind: true down projection, nothing true.",
    "fvu_floor": "fvu that no adapter can pass below, given what g can put out at all.",
    "fvu_self": "fvu when g is f itself behind a hidden rotation: what the solver can reach.",
    "score": "(null - fvu) / (null - fvu_self); null: least of linear, either random kind and 1.",
    "score_low, score_high": "95% interval of the score, with the spread of random experts.",
    "steps, converged": "Steps of the fit, and whether it had come to rest.",
    "self_converged": "Whether the fit behind fvu_self had come to rest.",
    "constant_kept": "Whether no fit beat the adapter that ignores its input.",
    "status": "ok, or why there is no number or a weak one.",
    "form, rank": "What the adapter may do, and the rank of its delta if it is of low rank.",
    "adapter_parameters, expert_parameters": "Size of the adapter, and of an expert.",
    "parameters_share": "Size of the adapter as a part of that of an expert.",
    "kind, train_fvu": "real, or random with the true down projection (by seed); training FVU.",
    "advantage": "Mean gain in held-out FVU over random experts at equal size of the adapter.",
    "parameters_saved": "How many times fewer parameters g needs for what random experts reach "
    "with the full matrix; missing where it does not reach that.",
    "pairs, scored, tested": "Pairs of experts; those with a score, and with an interval.",
    "above_zero, by_chance": "Intervals above zero; how many there would be at most by chance.",
    "best_score, median_score": "Over the pairs of experts of two layers.",
    "least_train, most_train": "Training tokens of the imitated experts.",
    "least_published, most_published": "Range of published_mse.",
    "size_correlation": "Rank correlation of published_mse with the variance of f(x), over the "
    "imitated experts.",
}


@figures(
    "align",
    title="Alignment",
    question="Which experts of one layer can be imitated by experts of another, if only the "
    "input may be changed, and better than without the expert?",
    columns=COLUMNS,
)
def draw(result: Result) -> list[Figure]:
    """Score, its controls, capacity, raw error beside it, convergence, distributions."""
    pairs = measured(result.table)
    drawn = [align_matrices.score(pairs)]
    if several_layers(pairs) and pairs["score"].notna().any():
        drawn.append(align_layers.layers(pairs))
    drawn.append(align_fits.controls(pairs))
    for name, curve in (("capacity", align_curves.capacity), ("learning", align_curves.learning)):
        rows = result.tables.get(name, pd.DataFrame())
        if not rows.empty and rows["fvu"].notna().any():
            drawn.append(curve(rows[rows["fvu"].notna()]))
    if pairs["published_mse"].notna().any():
        drawn += [align_matrices.published(pairs), align_fits.error_against_size(pairs)]
    further = {
        "curves": align_fits.convergence,
        "distributions": align_distributions.histograms,
        "pca": align_distributions.principal_components,
    }
    present = [name for name in further if not result.tables.get(name, pd.DataFrame()).empty]
    return drawn + [further[name](result.tables[name]) for name in present]
