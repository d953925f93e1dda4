"""What a table of alignments says in words, and what it does not."""

import pandas as pd

from moescope.runs import Finding

CHANCE = 0.025  # of a two-sided 95% interval to lie above zero where there is nothing


def findings(table: pd.DataFrame, source: int, target: int) -> list[Finding]:
    """Sentences that the table carries, most important first."""
    pairs = f"{len(table)} pairs of experts (layer {source} imitated by layer {target})"
    measured = table[table.fvu.notna()]
    if measured.empty:
        status = ", ".join(sorted(table.status.unique()))
        return [Finding(text=f"No number could be had for the {pairs}: {status}.")]
    scored = measured[measured.score.notna()]
    found = [] if scored.empty else [_evidence(scored, pairs), _controls(scored), _ceiling(scored)]
    if scored.empty:
        found = [Finding(text=f"No score for the {pairs}: {measured.status.iloc[0]}.")]
    return [*found, *_published(measured), *_caveats(table)]


def _evidence(scored: pd.DataFrame, pairs: str) -> Finding:
    above = scored[scored.score_low > 0]
    best = scored.iloc[int(scored.score.argmax())]
    interval = (
        f"95% interval {best.score_low:.2f} to {best.score_high:.2f}"
        if pd.notna(best.score_low)
        else "no interval"
    )
    text = (
        f"Of {pairs}, {len(above)} have a score whose 95% interval lies above zero "
        f"(about {CHANCE * len(scored):.1f} would by chance). Best: expert {best.source_expert} "
        f"imitated by expert {best.target_expert}, score {best.score:.2f} ({interval}; "
        f"{best.n_val} held-out tokens of {best.n_documents} documents). "
        "Zero is what the controls reach, one is the expert itself behind a hidden rotation."
    )
    numbers = {"pairs": len(scored), "above_zero": len(above), "best_score": float(best.score)}
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
        f"{scored.fvu_self.min():.3f} to {scored.fvu_self.max():.3f}; {settled} of "
        f"{len(scored)} fits had settled when they stopped."
    )
    return Finding(text=text, numbers={"settled": settled})


def _published(measured: pd.DataFrame) -> list[Finding]:
    """How far the published number follows the size of the outputs alone."""
    variance = measured.mse_mean / measured.fvu
    spread = variance.groupby(measured.source_expert).median()
    known = measured.published_mse.notna()
    if known.sum() < 3 or len(spread) < 2:
        return []
    correlation = measured.published_mse[known].corr(variance[known], method="spearman")
    text = (
        "The published protocol's number, an error on training tokens in raw units, ranges from "
        f"{measured.published_mse.min():.2g} to {measured.published_mse.max():.2g}; over these "
        f"{int(known.sum())} pairs its rank correlation with the variance of the imitated outputs "
        f"is {correlation:.2f}."
    )
    return [Finding(text=text, numbers={"spearman_with_variance": float(correlation)})]


def _caveats(table: pd.DataFrame) -> list[Finding]:
    counts = table.status[table.status != "ok"].value_counts()
    words = {
        "underdetermined": "have fewer training tokens than four times the hidden size",
        "few_documents": "have fewer than 30 held-out documents, hence no interval",
        "undefined": "have controls too close to the ceiling for a score",
        "too_few_tokens": "have too few tokens for any number",
        "constant_outputs": "imitate an expert whose outputs do not vary",
    }
    return [
        Finding(
            text=f"{n} of {len(table)} pairs {words[str(status)]}.", numbers={str(status): int(n)}
        )
        for status, n in counts.items()
        if status in words
    ]
