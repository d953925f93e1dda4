"""What the tables of `substitute` say in words."""

from collections.abc import Mapping

import pandas as pd

from moescope.analyses.fits import Source
from moescope.analyses.substitute.tables import POOLED
from moescope.corpora.corpus import RESERVED_DOMAIN
from moescope.measures.bootstrap import FEWEST_UNITS
from moescope.runs import Finding

_FORMS = {"low_rank": "a low-rank adapter", "layer_norm": "a full adapter"}
_WORDS = {
    "zero": "nothing in its place",
    "mean": "its mean output",
    "linear": "a linear map without any expert",
    "best": "the best expert of another layer",
    "drawn": "experts of other layers",
    "random": "random experts",
    "same_layer": "other experts of its own layer",
}
_VERDICTS = {
    "better": "costs less than",
    "worse": "costs more than",
    "open": "cannot be told from",
    "": "was not tested against",
}
_THAN = {"better": "do better than", "worse": "do worse than", "open": "cannot be told from"}


def findings(
    tables: Mapping[str, pd.DataFrame], refused: Mapping[Source, str], sources: int
) -> list[Finding]:
    """From losses, comparisons and curves.

    Args:
        tables: Of the result.
        refused: Experts that could not be taken out, with why.
        sources: How many were.
    """
    losses, against = tables["substitute"], tables["against"]
    found = list[Finding]()
    for (form, tuned), compared in against.groupby(["form", "tuned"], sort=False):
        behind = _FORMS[str(form)] + (", trained further on the loss" if tuned else "")
        by = _pooled(losses, str(form), bool(tuned))
        found += [_alone(by, behind, sources), _equal(by, compared, behind)]
        found += [_verdicts(compared, behind), _conclusion(compared, behind)]
    found += _reach(tables["reach"], sources)
    if refused:
        named = ", ".join(f"{source} ({status})" for source, status in refused.items())
        text = f"Left out, because no adapter can be fitted: {named}."
        found.append(Finding(text=text, numbers={"refused": len(refused)}))
    loose = losses[(losses["source"] != POOLED) & losses["underdetermined"]]["source"].unique()
    if len(loose):
        text = (
            "Adapters have more freedom than the tokens can settle, and full ones are fitted as "
            f"low-rank ones, for {', '.join(loose)}."
        )
        found.append(Finding(text=text, numbers={"underdetermined": len(loose)}))
    few = losses[losses["status"] == "few_documents"]["domain"].unique()
    if len(few):
        text = f"No intervals, for lack of held-out documents: {', '.join(few)}."
        found.append(Finding(text=text))
    return found


def _pooled(losses: pd.DataFrame, form: str, tuned: bool) -> dict[str, pd.Series]:
    """Means over experts and draws, all domains, by what stands in; ablations know no tuning."""
    rows = losses[(losses["source"] == POOLED) & (losses["domain"] == RESERVED_DOMAIN)]
    rows = rows[rows["form"].isin([form, ""]) & rows["draw"].isna()]
    rows = rows[(rows["tuned"] == tuned) | rows["by"].isin(["zero", "mean"])]
    return {row["by"]: row for _, row in rows.iterrows()}


def _alone(by: Mapping[str, pd.Series], behind: str, sources: int) -> Finding:
    """What stands in for one expert at a time, against having no expert there."""
    best = by["best"]
    said = [f"{_WORDS[one]} {_change(by[one])}" for one in ("zero", "mean", "linear")]
    text = (
        f"With one expert taken out at a time (the mean of {sources}) the loss changes by: with "
        f"{'; '.join(said)}; the best of {best['candidates']} experts of other layers behind "
        f"{behind} {_change(best)} nats per token ({best['n_tokens']:,} held-out tokens, "
        f"{best['n_documents']} documents)."
    )
    return Finding(text=text, numbers={name: row["difference"] for name, row in by.items()})


def _equal(by: Mapping[str, pd.Series], compared: pd.DataFrame, behind: str) -> Finding:
    """Experts of other layers against random ones that had as many to be chosen from."""
    kinds = [kind for kind in ("drawn", "random", "same_layer") if kind in by]
    said = "; ".join(
        f"the best of {by[kind]['candidates']} {_WORDS[kind]} {_change(by[kind])}" for kind in kinds
    )
    text = (
        f"Behind {behind}: {said} nats per token (random: the mean of {compared['draws'].max()} "
        "draws)."
    )
    return Finding(text=text, numbers={kind: by[kind]["difference"] for kind in kinds})


def _verdicts(compared: pd.DataFrame, behind: str) -> Finding:
    """What can be told of the mean over the experts."""
    parts, numbers = [], {}
    for _, row in compared[compared["source"] == POOLED].iterrows():
        by = _WORDS["best"] if row["by"] == "best" else "the best of those drawn from other layers"
        p_value = f", p = {row['p_corrected']:.2g}" if row["verdict"] else ""
        draws = f", single draws {row['least']:+.4f} to {row['most']:+.4f}"
        draws = draws if row["draws"] > 1 else ""
        parts.append(
            f"{by} {_VERDICTS[row['verdict']]} {_WORDS[row['than']]}: "
            f"{_change(row)}{p_value}{draws}"
        )
        numbers[f"{row['by']}_{row['than']}"] = row["difference"]
    text = (
        f"Behind {behind}, by paired differences of the loss, {'; '.join(parts)} (p by Holm's "
        "correction for all comparisons of the mean; of random experts interval and p are for one "
        "more draw)."
    )
    return Finding(text=text, numbers=numbers)


def _conclusion(compared: pd.DataFrame, behind: str) -> Finding:
    """Evidence is what neither a random expert nor a linear map does as well."""
    pooled = _against_nulls(compared[compared["source"] == POOLED])
    if not pooled.all():
        text = (
            f"Whether experts of other layers do what these experts do was not tested behind "
            f"{behind}: it takes {FEWEST_UNITS} held-out documents and two draws of random experts."
        )
        return Finding(text=text)
    each = compared[compared["source"] != POOLED].groupby("source", sort=False)
    names = [str(source) for source, rows in each if _evident(_against_nulls(rows))]
    text = "There is evidence" if _evident(pooled) else "There is no evidence"
    text += f" that experts of other layers do what these experts do: behind {behind} they "
    text += " and ".join(f"{_THAN[pooled[than]]} {_WORDS[than]}" for than in pooled.index)
    text += f". Taken one by one, {len(names)} of {each.ngroups} experts give such evidence"
    text += f": {', '.join(names)}." if names else "."
    return Finding(text=text, numbers={"evident": len(names), "sources": each.ngroups})


def _against_nulls(rows: pd.DataFrame) -> pd.Series:
    """Verdicts against what needs no likeness."""
    return rows.set_index("than")["verdict"].loc[["random", "linear"]]


def _evident(verdicts: pd.Series) -> bool:
    return bool((verdicts == "better").all())


def _reach(reach: pd.DataFrame, sources: int) -> list[Finding]:
    """How many experts go before the loss rises by each threshold."""
    found = []
    for threshold, rows in reach.groupby("threshold"):
        kinds = [of_kind for _, of_kind in rows.groupby(["by", "form"], sort=False)]
        names = (of_kind[["by", "form"]].agg("_".join, axis=1).iloc[0] for of_kind in kinds)
        text = (
            f"Of these {sources} experts, as many can go together before the loss has risen by "
            f"{threshold:.0%} (in brackets, as many surely, by the upper end of the interval): "
            f"{'; '.join(map(_reached, kinds))}. Parameters are of all routed experts, what has to "
            f"be kept instead counted ({rows['n_documents'].iloc[0]} documents)."
        )
        means = (float(of_kind["removed"].mean()) for of_kind in kinds)
        numbers = {name.rstrip("_"): mean for name, mean in zip(names, means, strict=True)}
        found.append(Finding(text=text, numbers=numbers))
    return found


def _reached(rows: pd.DataFrame) -> str:
    """With one kind of stand-in; of random experts over the draws."""
    first, share = rows.iloc[0], rows["saved_share"].mean()
    number = _from_to(rows["removed"])
    if rows["sure"].notna().all():
        number += f" ({_from_to(rows['sure'])})"
    behind = f" behind {_FORMS[str(first['form'])]}" if first["form"] else ""
    saved = "saving" if share >= 0 else "adding"
    return f"{number} with {_WORDS[str(first['by'])]}{behind}, {saved} {abs(share):.1%}"


def _from_to(numbers: pd.Series) -> str:
    return " to ".join(dict.fromkeys(map(str, (numbers.min(), numbers.max()))))


def _change(row: pd.Series) -> str:
    interval = ""
    if pd.notna(row["difference_low"]):
        low, high = row["difference_low"], row["difference_high"]
        interval = f" (95% interval {low:+.4f} to {high:+.4f})"
    return f"{row['difference']:+.4f}{interval}"
