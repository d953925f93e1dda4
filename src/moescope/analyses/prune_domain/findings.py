"""What the tables of `prune-domain` say in words."""

from collections.abc import Mapping, Sequence

import pandas as pd

from moescope.analyses.prune_domain.saving import MASKED
from moescope.measures.bootstrap import FEWEST_UNITS
from moescope.runs import Finding


def findings(tables: Mapping[str, pd.DataFrame], shares: Sequence[float]) -> list[Finding]:
    """From the tables of the result, and the shares that asked for sizes."""
    against, saving = tables["against"], tables["saving"]
    own = against[against["where"] == "own"]
    num_experts = int(saving["num_experts"].iloc[0])
    found = [_rises(rows, num_experts) for _, rows in against.groupby("kept")]
    found.append(_versus_random(own))
    if own["versus_pooled"].notna().any():
        found.append(_versus_pooled(own))
        found += _elsewhere(against[against["where"] == "elsewhere"])
    else:
        text = (
            "The text has one domain: what its experts cost elsewhere, and whether a choice on all "
            "text is as good, is not measured."
        )
        found.append(Finding(text=text))
    found += [_agreement(tables["choice"]), _saving(saving)]
    return [*found, *_left_out(against, saving, shares)]


def _rises(rows: pd.DataFrame, num_experts: int) -> Finding:
    """Of one size: the domains that lose least and most, and what the rest of the text loses."""
    own = rows[rows["where"] == "own"].sort_values("rise")
    elsewhere = rows[rows["where"] == "elsewhere"]
    kept, low, high = int(own["kept"].iloc[0]), own.iloc[0], own.iloc[-1]
    span = f"{_rise(low)}" if len(own) == 1 else f"{_rise(low)} to {_rise(high)}"
    text = (
        f"With {kept} of {num_experts} experts per layer, chosen for one domain on other documents "
        f"of it, the loss on that domain rises by {span} nats per token; with random ones by "
        f"{_range(own['random_rise'])}."
    )
    numbers = {"kept": kept, "least": low["rise"], "most": high["rise"]}
    if len(elsewhere):
        text += f" On the other domains it rises by {_range(elsewhere['rise'])}."
        numbers |= {"elsewhere_least": elsewhere["rise"].min()}
        numbers |= {"elsewhere_most": elsewhere["rise"].max()}
    return Finding(text=text, numbers=numbers)


def _rise(row: pd.Series) -> str:
    interval = ""
    if pd.notna(row["rise_low"]):
        interval = f"; 95% interval {_nats(row['rise_low'])} to {_nats(row['rise_high'])}"
    return f"{_nats(row['rise'])} ({row['chosen_for']}{interval})"


def _range(values: pd.Series) -> str:
    low, high = _nats(values.min()), _nats(values.max())
    return low if low == high else f"{low} to {high}"


def _nats(value: float) -> str:
    """Without a sign of its own where it rounds to zero."""
    return f"{round(value, 3) + 0.0:+.3f}"


def _versus_random(own: pd.DataFrame) -> Finding:
    below = own["rise"] < own["random_least"]
    better = (own["versus_random_high"] < 0) & below
    worse = own["versus_random_low"] > 0
    draws = int(own["random_draws"].iloc[0])
    return _verdict(
        own,
        better,
        worse,
        f"random ones (paired 95% interval below zero, and below each of {draws} random choices, "
        f"as one of {draws + 1} equal choices is by chance 1 time in {draws + 1})",
        "random",
    )


def _versus_pooled(own: pd.DataFrame) -> Finding:
    better, worse = own["versus_pooled_high"] < 0, own["versus_pooled_low"] > 0
    against = "as many chosen on all text (paired 95% interval below zero)"
    return _verdict(own, better, worse, against, "pooled")


def _verdict(
    own: pd.DataFrame, better: pd.Series, worse: pd.Series, against: str, name: str
) -> Finding:
    """In how many comparisons the domain's own choice is better, and where it is not."""
    measured = own[f"versus_{name}_low"].notna()
    if not measured.any():
        text = (
            f"Whether experts chosen for a domain are better on it than {against} cannot be said: "
            f"no domain has {FEWEST_UNITS} documents."
        )
        return Finding(text=text)
    total = int(measured.sum())
    text = (
        f"Experts chosen for a domain are better on it than {against} in {int(better.sum())} of "
        f"{total} comparisons, domain by size, not corrected for their number."
    )
    if not better.any():
        text += " Choosing by domain is not shown to be better here."
    open_ones = own[measured & ~better & ~worse]
    if worse.any():
        text += f" Worse: {_cases(own[worse])}."
    if better.any() and len(open_ones):
        text += f" Not shown to be better: {_cases(open_ones)}."
    difference = own.loc[measured, f"versus_{name}"]
    text += f" The differences are {_range(difference)} nats per token."
    numbers = {"better": int(better.sum()), "worse": int(worse.sum()), "comparisons": total}
    numbers |= {"least": difference.min(), "most": difference.max()}
    return Finding(text=text, numbers=numbers)


def _cases(rows: pd.DataFrame) -> str:
    return ", ".join(f"{row['chosen_for']} with {row['kept']}" for _, row in rows.iterrows())


def _elsewhere(elsewhere: pd.DataFrame) -> list[Finding]:
    """What a choice for one domain costs the others, against a choice on all text."""
    measured = elsewhere["versus_pooled_low"].notna()
    if not measured.any():
        return []
    worse = int((elsewhere["versus_pooled_low"] > 0).sum())
    difference = elsewhere.loc[measured, "versus_pooled"]
    text = (
        f"On the other domains they are worse than as many chosen on all text in {worse} of "
        f"{int(measured.sum())} comparisons; the differences are {_range(difference)} nats per "
        "token."
    )
    return [Finding(text=text, numbers={"worse": worse, "comparisons": int(measured.sum())})]


def _agreement(choice: pd.DataFrame) -> Finding:
    rows = choice[choice["agreement"].notna()]
    by_size = rows.groupby("kept")["agreement"].mean()
    said = ", ".join(f"{share:.0%} with {kept}" for kept, share in by_size.items())
    text = (
        "Experts chosen on one half of the documents are also those of the other half, on average "
        f"over layers and domains, to {said}."
    )
    return Finding(text=text, numbers={f"kept_{kept}": share for kept, share in by_size.items()})


def _saving(saving: pd.DataFrame) -> Finding:
    row, full = saving.iloc[0], saving.iloc[-1]
    share = row["active_parameters"] / full["active_parameters"]
    weights = "not counted" if pd.isna(row["weights_left"]) else f"{row['weights_left']:.0%}"
    active = "not counted" if pd.isna(share) else f"{share:.0%}"
    how = "masked but in memory; bytes by counting" if row["timed_as"] == MASKED else "taken out"
    text = (
        f"With {row['kept']} of {full['kept']} experts per layer the bytes of the weights are "
        f"{weights} of what they were, the parameters that a token meets {active}, and the time to "
        f"read a text {row['ratio']:.2f} (the others {how}; median of {row['repeats']} rounds of "
        f"{row['tokens_per_pass']} tokens on {row['device']}, {row['threads']} threads)."
    )
    numbers = {"weights_left": row["weights_left"], "time_ratio": row["ratio"]}
    return Finding(text=text, numbers=numbers)


def _left_out(
    against: pd.DataFrame, saving: pd.DataFrame, shares: Sequence[float]
) -> list[Finding]:
    """Sizes that were not tried, and domains without intervals."""
    found = []
    if beyond := [share for share in shares if share > saving["share"].max()]:
        said = ", ".join(f"{share:g}" for share in beyond)
        text = f"Not tried, as they take all experts of some layer: shares of {said}."
        found.append(Finding(text=text))
    few = against[(against["where"] == "own") & (against["status"] == "few_documents")]
    if len(few):
        names = ", ".join(few["chosen_for"].unique())
        found.append(Finding(text=f"No intervals, for lack of documents: {names}."))
    return found
