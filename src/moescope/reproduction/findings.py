"""What a study that was run again says beside the published one, and what it cannot say."""

from collections.abc import Mapping, Sequence

import pandas as pd

from moescope.reproduction.published import PublishedTable
from moescope.runs import Finding, Result

FEWEST_VALUES = 10
"""Comparable values below which no agreement of ranks is quoted."""
FEWEST_ROWS = 3
"""Measured rows below which none is said to stand out."""


def claims_table(
    claims: Mapping[str, str], found: Mapping[str, Result], differences: Sequence[str]
) -> pd.DataFrame:
    """What the study says in words, beside what the same analysis says here."""
    why = "; ".join(differences) or "same model as far as known; words, not numbers"
    return pd.DataFrame(
        {
            "analysis": analysis,
            "published": claim,
            "found": " ".join(finding.text for finding in found[analysis].findings),
            "why": why,
        }
        for analysis, claim in claims.items()
    )


def claim_findings(
    claims: Mapping[str, str], found: Mapping[str, Result], model: str
) -> list[Finding]:
    """Each claim, and the first of what is said here."""
    return [
        Finding(
            text=f"Published in words, of {analysis}: {claim} On {model}: "
            f"{next((finding.text for finding in found[analysis].findings), 'nothing to say.')}"
        )
        for analysis, claim in claims.items()
    ]


def table_findings(published: PublishedTable, table: pd.DataFrame, model: str) -> list[Finding]:
    """What the comparison says in words, and what it cannot say."""
    measured = table[table.measured.notna()]
    comparable = measured[measured.comparable == "yes"]
    text = (
        f"{published.source}: of {len(table)} published values {len(measured)} were "
        f"measured here, and {len(comparable)} of these are comparable."
    )
    if reasons := sorted(set(table[table.comparable == "no"].why)):
        text += f" Not comparable: {' / '.join(reasons)}."
    counts = {"values": len(table), "measured": len(measured), "comparable": len(comparable)}
    found = [Finding(text=text, numbers=counts)]
    if measured[published.rows].nunique() >= FEWEST_ROWS and (measured.published > 0).all():
        found.append(_standing_out(published, measured, model))
    return [*found, _agreement(comparable)]


def _standing_out(published: PublishedTable, measured: pd.DataFrame, model: str) -> Finding:
    """Whether one row is far above the others, published and measured."""
    rows = published.rows
    means = measured.groupby(rows)[["published", "measured"]].mean()
    said, numbers = [], dict[str, float | int | str]()
    for kind in ("published", "measured"):
        most = means[kind].idxmax()
        times = means[kind].max() / means[kind].drop(most).median()
        where = f"measured on {model}" if kind == "measured" else kind
        said.append(f"{where}, that of {rows} {most}, {times:,.3g} times the median of the others")
        numbers |= {f"{kind}_largest": str(most), f"{kind}_times": float(times)}
    text = f"Largest mean of a row (over the same cells): {'; '.join(said)}."
    return Finding(text=text, numbers=numbers)


def _agreement(comparable: pd.DataFrame) -> Finding:
    count = len(comparable)
    if count < FEWEST_VALUES:
        text = f"{count} comparable values are too few to say whether their order agrees."
        return Finding(text=text, numbers={"comparable": count})
    rank = comparable.published.rank().corr(comparable.measured.rank())
    low, high = comparable.ratio.min(), comparable.ratio.max()
    text = (
        f"Rank correlation of the {count} comparable values: {rank:.2f}; measured is {low:.3g} to "
        f"{high:.3g} times the published value. Values of a row are not independent."
    )
    numbers = {"comparable": count, "rank_correlation": rank, "least": low, "most": high}
    return Finding(text=text, numbers=numbers)
