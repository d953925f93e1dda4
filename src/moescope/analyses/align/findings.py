"""What a table of alignments says in words, and what it does not."""

from collections.abc import Mapping

import pandas as pd

from moescope.analyses.align.curve_findings import capacity_findings, learning_findings
from moescope.analyses.align.layers import CHANCE, LAYERS, by_layers
from moescope.runs import Finding

MOST_NAMED = 6
"""Pairs of layers that one sentence names."""


def findings(tables: Mapping[str, pd.DataFrame]) -> list[Finding]:
    """Sentences that the tables carry, most important first."""
    table = tables["align"]
    pairs = f"{len(table)} pairs of experts ({_which_layers(table)})"
    measured = table[table.fvu.notna()]
    if measured.empty:
        return [Finding(text=f"No number could be had for the {pairs}: {_statuses(table)}.")]
    scored = measured[measured.score.notna()]
    if scored.empty:
        found = [Finding(text=f"No score for the {pairs}: {_statuses(measured)}.")]
    else:
        found = [_evidence(scored, pairs), _controls(scored), _ceiling(scored)]
    return [
        *found,
        *capacity_findings(tables.get("capacity", pd.DataFrame())),
        *learning_findings(tables.get("learning", pd.DataFrame())),
        *_published(measured),
        _economics(measured),
        *_divergences(measured),
        *_caveats(table),
    ]


def _statuses(table: pd.DataFrame) -> str:
    return ", ".join(sorted(table.status.unique()))


def _which_layers(table: pd.DataFrame) -> str:
    several = table.groupby(LAYERS).ngroups
    if several > 1:
        return f"{several} pairs of layers"
    first = table.iloc[0]
    return f"layer {first.source_layer} imitated by layer {first.target_layer}"


def _evidence(scored: pd.DataFrame, pairs: str) -> Finding:
    tested = scored[scored.score_low.notna()]
    above = int((tested.score_low > 0).sum())
    best = scored.iloc[int(scored.score.argmax())]
    if tested.empty:
        text = f"Of {pairs}, none has an interval: too few held-out documents."
        interval = "no interval"
    else:
        text = (
            f"Of {pairs}, {above} of the {len(tested)} with an interval have a score whose 95% "
            f"interval lies above zero (at most about {CHANCE * len(tested):.1f} would by chance)"
            f"{_where_above(tested)}."
        )
        interval = f"95% interval {best.score_low:.2f} to {best.score_high:.2f}, not corrected"
    text += (
        f" Largest of {len(scored)}: {_named(best, scored)}, score {best.score:.2f} ({interval}; "
        f"{best.n_val} held-out tokens of {best.n_documents} documents). Zero is what the "
        "controls reach, one is the expert itself behind a hidden rotation."
    )
    numbers = {"pairs": len(scored), "above_zero": above, "best_score": float(best.score)}
    return Finding(text=text, numbers=numbers)


def _named(pair: pd.Series, table: pd.DataFrame) -> str:
    """A pair of experts, with its layers where the table has several."""
    if table.groupby(LAYERS).ngroups == 1:
        return f"expert {pair.source_expert} imitated by expert {pair.target_expert}"
    return (
        f"expert {pair.source_expert} of layer {pair.source_layer} imitated by expert "
        f"{pair.target_expert} of layer {pair.target_layer}"
    )


def _where_above(tested: pd.DataFrame) -> str:
    """In which pairs of layers the intervals above zero lie, where there are several."""
    layers = by_layers(tested)
    with_some = layers[layers.above_zero > 0].sort_values(
        "above_zero", ascending=False, kind="stable"
    )
    if len(layers) == 1 or with_some.empty:
        return ""
    named = [
        f"{row.source_layer} \u2192 {row.target_layer} {row.above_zero} of {row.tested}"
        for row in with_some.head(MOST_NAMED).itertuples()
    ]
    left = len(with_some) - len(named)
    named += [f"{left} more pairs of layers with fewer"] if left else []
    none = len(layers) - len(with_some)
    named += [f"none in {none} pair{'s' if none > 1 else ''} of layers"] if none else []
    return f": {', '.join(named)}"


def _controls(scored: pd.DataFrame) -> Finding:
    linear = int((scored.fvu_linear <= scored.fvu).sum())
    random = int((scored.fvu_random <= scored.fvu).sum())
    text = (
        f"A linear map without any expert does as well as the imitating expert or better in "
        f"{linear} of {len(scored)} pairs, random experts do in {random} (held-out FVU, "
        f"medians: pair {scored.fvu.median():.2f}, linear map {scored.fvu_linear.median():.2f}, "
        f"random experts {scored.fvu_random.median():.2f})."
    )
    numbers = {"linear_as_good": linear, "random_as_good": random}
    layers = by_layers(scored)
    if len(layers) > 1:
        below_linear = int((layers.fvu < layers.fvu_linear).sum())
        below_random = int((layers.fvu < layers.fvu_random).sum())
        text += (
            f" By pair of layers, the median of the pairs lies below that of the linear map in "
            f"{below_linear} of {len(layers)}, below that of random experts in {below_random}."
        )
        numbers |= {"layers_below_linear": below_linear, "layers_below_random": below_random}
    return Finding(text=text, numbers=numbers)


def _ceiling(scored: pd.DataFrame) -> Finding:
    settled = int(scored.converged.sum())
    text = (
        f"Where a rotation is the answer by construction, the solver leaves a held-out FVU of "
        f"{scored.fvu_self.min():.3f} to {scored.fvu_self.max():.3f}. {settled} of the "
        f"{len(scored)} fits of pairs had settled when they stopped."
    )
    return Finding(text=text, numbers={"settled": settled})


def _published(measured: pd.DataFrame) -> list[Finding]:
    """How far the published number follows the size of the outputs alone."""
    known = measured[measured.published_mse.notna()]
    if known.empty:
        return []
    least, largest = known.published_mse.min(), known.published_mse.max()
    text = (
        "The published protocol's number, an error on training tokens in raw units, ranges from "
        f"{least:.2g} to {largest:.2g}."
    )
    numbers = {"least": least, "largest": largest}
    correlations = by_layers(known).size_correlation.dropna()
    if len(correlations) == 1:
        correlation = float(correlations.iloc[0])
        numbers["spearman_with_variance"] = correlation
        text += (
            f" Over the imitated experts{_of_one(known)} its rank correlation with the variance "
            f"of their outputs is {correlation:.2f}."
        )
    elif len(correlations):
        lowest, highest = float(correlations.min()), float(correlations.max())
        numbers |= {"lowest_spearman": lowest, "highest_spearman": highest}
        text += (
            " Its rank correlation with the variance of the outputs, over the imitated experts of "
            f"one pair of layers, lies between {lowest:.2f} and {highest:.2f} in "
            f"{len(correlations)} pairs of layers."
        )
    return [Finding(text=text, numbers=numbers)]


def _of_one(known: pd.DataFrame) -> str:
    """Words for the only pair of layers with enough imitated experts, if there are others."""
    if known.groupby(LAYERS).ngroups == 1:
        return ""
    return " of the one pair of layers that has enough of them"


def _economics(measured: pd.DataFrame) -> Finding:
    """What an imitation costs in parameters, against the expert that it would replace."""
    shares = measured.parameters_share
    sizes, experts = measured.adapter_parameters, measured.expert_parameters
    text = (
        f"An adapter holds {_range(sizes, ',.0f')} numbers, {_range(shares, '.1%')} of the "
        f"{_range(experts, ',.0f')} of an expert: so much does it cost to have another expert "
        "stand in for one."
    )
    return Finding(text=text, numbers={"least_share": shares.min(), "largest_share": shares.max()})


def _range(values: pd.Series, number: str) -> str:
    least, largest = format(values.min(), number), format(values.max(), number)
    return least if least == largest else f"{least} to {largest}"


def _divergences(measured: pd.DataFrame) -> list[Finding]:
    """How near the changed inputs come to those that the targets have in their own layer."""
    known = measured.dropna(subset=["kl_before", "kl_after", "mmd_before", "mmd_after"])
    if known.empty:
        return []
    medians = known[["kl_before", "kl_after", "mmd_before", "mmd_after"]].median()
    text = (
        "Away from the inputs that the imitating expert has in its own layer, before the adapter "
        f"and behind it: Gaussian KL divergence {medians.kl_before:.3g} and "
        f"{medians.kl_after:.3g}, squared MMD {medians.mmd_before:.2g} and "
        f"{medians.mmd_after:.2g} (medians over {len(known)} pairs)."
    )
    return [Finding(text=text, numbers={str(k): float(v) for k, v in medians.items()})]


def _caveats(table: pd.DataFrame) -> list[Finding]:
    """How many pairs rest on too little; a pair may be counted in several sentences."""
    numbers = table.fvu.notna()
    loose = numbers & table.underdetermined
    lower = table[loose & (table.form == "low_rank")]
    ranks = "" if lower.empty else f"; fitted at rank {_range(lower['rank'], '.0f')}"
    counts = {
        "have too few tokens for any number": table.status == "too_few_tokens",
        "imitate an expert whose outputs do not vary": table.status == "constant_outputs",
        "have controls too close to the ceiling for a score": table.status == "undefined",
        "have too few held-out documents for an interval": numbers & table.fvu_low.isna(),
        "ran out of time before they or their ceiling had settled": table.status == "not_settled",
        f"have fewer training tokens than the adapter asked for needs{ranks}": loose,
    }
    return [
        Finding(text=f"{int(chosen.sum())} of {len(table)} pairs {words}.")
        for words, chosen in counts.items()
        if chosen.any()
    ]
