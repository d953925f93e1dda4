"""What a table of alignments says in words, and what it does not."""

import pandas as pd

from moescope.runs import Finding

CHANCE = 0.025
"""Chance of a 95% interval to lie above zero where there is nothing."""
FEWEST_SOURCES = 5
"""Imitated experts below which no correlation over them is quoted."""


def findings(table: pd.DataFrame, source: int, target: int) -> list[Finding]:
    """Sentences that the table carries, most important first."""
    pairs = f"{len(table)} pairs of experts (layer {source} imitated by layer {target})"
    measured = table[table.fvu.notna()]
    if measured.empty:
        status = ", ".join(sorted(table.status.unique()))
        return [Finding(text=f"No number could be had for the {pairs}: {status}.")]
    scored = measured[measured.score.notna()]
    if scored.empty:
        status = ", ".join(sorted(measured.status.unique()))
        found = [Finding(text=f"No score for the {pairs}: {status}.")]
    else:
        found = [_evidence(scored, pairs), _controls(scored), _ceiling(scored)]
    return [*found, *_published(measured), *_caveats(table)]


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
            f"interval lies above zero (at most about {CHANCE * len(tested):.1f} would by chance)."
        )
        interval = f"95% interval {best.score_low:.2f} to {best.score_high:.2f}, not corrected"
    text += (
        f" Largest of {len(scored)}: expert {best.source_expert} imitated by expert "
        f"{best.target_expert}, score {best.score:.2f} ({interval}; {best.n_val} held-out tokens "
        f"of {best.n_documents} documents). Zero is what the controls reach, one is the expert "
        "itself behind a hidden rotation."
    )
    numbers = {"pairs": len(scored), "above_zero": above, "best_score": float(best.score)}
    return Finding(text=text, numbers=numbers)


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
    return Finding(text=text, numbers=numbers)


def _ceiling(scored: pd.DataFrame) -> Finding:
    settled = int(scored.converged.sum())
    text = (
        f"Where there is an answer by construction, the solver leaves a held-out FVU of "
        f"{scored.fvu_self.min():.3f} to {scored.fvu_self.max():.3f}. {settled} of the "
        f"{len(scored)} fits of pairs had settled when they stopped."
    )
    return Finding(text=text, numbers={"settled": settled})


def _published(measured: pd.DataFrame) -> list[Finding]:
    """How far the published number follows the size of the outputs alone."""
    known = measured[measured.published_mse.notna()]
    if known.empty:
        return []
    text = (
        "The published protocol's number, an error on training tokens in raw units, ranges from "
        f"{known.published_mse.min():.2g} to {known.published_mse.max():.2g}."
    )
    numbers = {"least": known.published_mse.min(), "largest": known.published_mse.max()}
    by_source = known.assign(variance=known.mse_mean / known.fvu).groupby("source_expert")
    medians = by_source[["published_mse", "variance"]].median()
    if len(medians) >= FEWEST_SOURCES:
        correlation = medians["published_mse"].corr(medians["variance"], method="spearman")
        numbers["spearman_with_variance"] = correlation
        text += (
            f" Over the {len(medians)} imitated experts its rank correlation with the variance "
            f"of their outputs is {correlation:.2f}."
        )
    return [Finding(text=text, numbers=numbers)]


def _caveats(table: pd.DataFrame) -> list[Finding]:
    """How many pairs rest on too little; a pair may be counted in several sentences."""
    numbers = table.fvu.notna()
    counts = {
        "have too few tokens for any number": table.status == "too_few_tokens",
        "imitate an expert whose outputs do not vary": table.status == "constant_outputs",
        "have controls too close to the ceiling for a score": table.status == "undefined",
        "have too few held-out documents for an interval": numbers & table.fvu_low.isna(),
        "have fewer training tokens than four times the hidden size": numbers
        & (table.n_train < 4 * _hidden_size(table)),
    }
    return [
        Finding(text=f"{int(chosen.sum())} of {len(table)} pairs {words}.")
        for words, chosen in counts.items()
        if chosen.any()
    ]


def _hidden_size(table: pd.DataFrame) -> "pd.Series[float]":
    return table.mse_sum / table.mse_mean
