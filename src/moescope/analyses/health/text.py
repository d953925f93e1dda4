"""Routing along the text: runs of experts, neighbours, and tokens predicted best and worst."""

import numpy as np
import pandas as pd

from moescope.analyses.health.layer import LEVEL, Layer, Seen, too_few_shuffles
from moescope.analyses.health.loss import DECILE
from moescope.evaluate.totals import Resampling, difference_reach
from moescope.measures.bootstrap import FEWEST_UNITS, ROUNDING, ratio_interval
from moescope.measures.decisions import paired_divergence_test, zero_mean_p_value
from moescope.measures.expert_runs import geometric_run, mean_run
from moescope.measures.jackknife import log_limits, whole_and_left_out


def alike_neighbours(layer: Layer) -> Seen:
    """Experts that stay longer, or change sooner, than where a passage is shuffled."""
    slots, stayed, shuffled = map(layer.along.column, ("slots", "stayed", "shuffled"))
    measure, options = "switch rate: experts that the next token does not use", layer.options
    if not slots.any():
        return Seen(measure=measure, value=np.nan, obstacle="no token has a next one")
    low, high = ratio_interval(
        (slots - stayed)[:, None], slots, resamples=options.bootstrap, seed=options.seed
    )
    excess = stayed - shuffled
    excess[np.abs(excess) <= ROUNDING * slots] = 0
    p_value = min(1.0, layer.layers * zero_mean_p_value(excess))
    ratio = stayed.sum() / shuffled.sum() if shuffled.sum() else np.nan
    return Seen(
        measure=measure,
        value=1 - float(stayed.sum() / slots.sum()),
        reference=1 - float(shuffled.sum() / slots.sum()),
        low=float(low[0]),
        high=float(high[0]),
        p_value=p_value,
        failed=p_value <= LEVEL,
        evidence=f"an expert stays for the next token {ratio:.2f} times as often as in shuffled "
        "passages",
    )


def worst_tokens(layer: Layer) -> Seen:
    """Tokens that are predicted badly and go to other experts than those predicted well."""
    by_loss = layer.along.by_loss
    assert by_loss is not None, "checked without losses"
    measure, options = "divergence of best- and worst-predicted tokens (bits)", layer.options
    documents = int(by_loss.best.any(1).sum())
    if documents < FEWEST_UNITS:
        few = f"{documents} documents have passages of {DECILE} tokens, not {FEWEST_UNITS}"
        return Seen(measure=measure, value=np.nan, obstacle=few)
    found, null = paired_divergence_test(
        by_loss.best, by_loss.worst, permutations=options.permutations, seed=options.seed
    )
    p_value = min(1.0, layer.layers * float((1 + (null >= found).sum()) / (1 + len(null))))
    return Seen(
        measure=measure,
        value=found,
        reference=float(null.mean()),
        reference_p95=float(np.quantile(null, 0.95)),
        p_value=p_value,
        failed=p_value <= LEVEL,
        obstacle=too_few_shuffles(layer, layer.layers),
        evidence=f"the worst-predicted tenth is routed apart from the best: {found:.4f} bits, "
        f"{null.mean():.4f} with documents swapped",
    )


def runs_table(layer: Layer) -> pd.DataFrame:
    """Mean run of every expert, beside that of independent and of shuffled tokens."""
    every = whole_and_left_out(layer.along.runs)
    tokens, stayed = every[0]
    share = tokens / layer.survey.tokens.sum()
    low, high = log_limits(mean_run(every[:, 0], every[:, 1]))
    return pd.DataFrame(
        {
            **layer.counts.names,
            "expert": range(len(share)),
            "share": share,
            "tokens": tokens,
            "runs": tokens - stayed,
            "mean_run": mean_run(tokens, stayed),
            "low": low,
            "high": high,
            "shuffled": mean_run(tokens, layer.along.shuffled),
            "independent": geometric_run(share),
            "n_documents": int((layer.survey.tokens > 0).sum()),
        }
    )


def loss_table(layer: Layer) -> pd.DataFrame:
    """Entropy and margin of the router at the best- and the worst-predicted tokens."""
    by_loss = layer.along.by_loss
    assert by_loss is not None, "asked for without losses"
    options = layer.options
    resampling = Resampling(resamples=options.bootstrap, seed=options.seed)
    marked = by_loss.sums[(by_loss.sums[:, :, 0] > 0).any(1)]
    tokens = marked[:, :, 0]
    rows = []
    for number, measure in enumerate(("entropy of the router (bits)", "margin"), start=1):
        sums = marked[:, :, number]
        best, worst = sums.sum(0) / tokens.sum(0) if len(marked) else (np.nan, np.nan)
        reach = difference_reach(sums[:, 1] - sums[:, 0], tokens[:, 1], resampling)
        rows.append(
            {
                **layer.counts.names,
                "measure": measure,
                "best": best,
                "worst": worst,
                "difference": worst - best,
                "low": worst - best - reach,
                "high": worst - best + reach,
                "n_tokens": int(tokens[:, 1].sum()),
                "n_documents": len(marked),
                "seed": options.seed,
            }
        )
    return pd.DataFrame(rows)
