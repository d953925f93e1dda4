"""What the tables of `ood` say in words."""

from collections.abc import Mapping

import pandas as pd

from moescope.analyses.ood.matrices import ELSEWHERE, SAME
from moescope.corpora.corpus import RESERVED_DOMAIN
from moescope.measures.bootstrap import FEWEST_UNITS
from moescope.runs import Finding

SIGNIFICANT = 0.05
"""Of p-values after Holm's correction."""
NAMES = {"real": "target behind an adapter", "random": "random expert", "linear": "linear map"}
"""What stands in for an expert, in words."""
UNITS = {"fvu": "", "loss": " nats per token"}


def findings(tables: Mapping[str, pd.DataFrame]) -> list[Finding]:
    """What adapters keep and lose elsewhere, beside a linear map and a random expert."""
    table, differences = tables["ood"], tables["differences"]
    found = [_error(table, differences)]
    found += [_controls(table, tables["controls"])]
    if "loss" in set(table["quantity"]):
        found.append(_loss(table, differences))
    few = table[table["status"] == "few_documents"]["tested_on"].unique()
    if len(few):
        text = f"No intervals under {FEWEST_UNITS} documents: {', '.join(few)}."
        found.append(Finding(text=text))
    return found


def _error(table: pd.DataFrame, differences: pd.DataFrame) -> Finding:
    rows = table.query("quantity == 'fvu' and adapter == 'real'")
    own = rows[rows["trained_on"] == rows["tested_on"]]
    where = "quantity == 'fvu' and adapter == 'real' and tested_on != 'all'"
    single = differences.query(where)
    single = single[~single["trained_on"].isin((ELSEWHERE, RESERVED_DOMAIN))]
    sources = int(rows["n_sources"].iloc[0])
    text = (
        f"Adapters of {sources} expert{'s' if sources > 1 else ''}, trained on "
        f"{int(rows['least_train'].min()):,} to {int(rows['most_train'].max()):,} tokens of one "
        f"domain, leave an FVU of {_range(own['value'])} on other documents of it. Trained on "
        f"another domain they leave {_mean(differences, 'fvu', 'real', ELSEWHERE)} more, in the "
        f"mean; trained on as many tokens of all domains "
        f"{_mean(differences, 'fvu', 'real', RESERVED_DOMAIN)}. {_clear(single)}"
    )
    beyond = rows[(rows["trained_on"] != rows["tested_on"]) & (rows["trained_on"] != "all")]
    worse, clear = (int((beyond[column] > 1).sum()) for column in ("value", "value_low"))
    text += (
        f" In {worse} of {len(beyond)} pairs of domains an adapter from elsewhere does worse than "
        f"the mean output of the domain ({clear} with all of the 95% interval)."
    )
    numbers = {"least": own["value"].min(), "most": own["value"].max(), "worse_than_mean": worse}
    return Finding(text=text, numbers=numbers)


def _controls(table: pd.DataFrame, controls: pd.DataFrame) -> Finding:
    said = []
    numbers: dict[str, float] = {}
    for adapter, name in NAMES.items():
        rows = table.query("quantity == 'fvu' and adapter == @adapter and trained_on != 'all'")
        own = rows["trained_on"] == rows["tested_on"]
        inside, outside = rows[own]["value"].mean(), rows[~own]["value"].mean()
        said.append(f"{name} {inside:.3f} and {outside:.3f}")
        numbers |= {f"{adapter}_in": inside, f"{adapter}_out": outside}
    less = [
        f"the {NAMES[control]} by {_with_limits(row)}"
        for control in ("random", "linear")
        for _, row in controls[
            (controls["quantity"] == "fvu")
            & (controls["control"] == control)
            & (controls["trained_on"] == SAME)
        ].iterrows()
    ]
    text = (
        "Mean FVU over domains, trained on the same domain and on another: "
        f"{'; '.join(said)}. At home the target behind an adapter differs from "
        f"{' and from '.join(less)} (below zero it is better). What a linear map or a random "
        "expert keeps elsewhere says nothing about the target."
    )
    return Finding(text=text, numbers=numbers)


def _loss(table: pd.DataFrame, differences: pd.DataFrame) -> Finding:
    rows = table.query("quantity == 'loss' and adapter == 'real'")
    own = rows[rows["trained_on"] == rows["tested_on"]]["value"]
    zero = table.query("quantity == 'loss' and adapter == 'zero'")["value"]
    single = differences.query("quantity == 'loss' and adapter == 'real' and tested_on != 'all'")
    single = single[~single["trained_on"].isin((ELSEWHERE, RESERVED_DOMAIN))]
    text = (
        f"Put into the model, one expert at a time, they raise the loss of their own domain by "
        f"{_range(own, 4)} nats per token (the expert's output set to zero: {_range(zero, 4)}); "
        f"those of another domain by {_mean(differences, 'loss', 'real', ELSEWHERE, 4)} more, "
        f"those of all domains by {_mean(differences, 'loss', 'real', RESERVED_DOMAIN, 4)}; "
        f"linear maps of another domain by "
        f"{_mean(differences, 'loss', 'linear', ELSEWHERE, 4)} more than those of the same. "
        f"{_clear(single)}"
    )
    return Finding(text=text, numbers={"own": own.mean(), "zero": zero.mean()})


def _mean(
    differences: pd.DataFrame, quantity: str, adapter: str, trained: str, digits: int = 3
) -> str:
    """The mean over domains tested on, with its interval."""
    rows = differences[
        (differences["quantity"] == quantity)
        & (differences["adapter"] == adapter)
        & (differences["trained_on"] == trained)
        & (differences["tested_on"] == RESERVED_DOMAIN)
    ]
    return _with_limits(rows.iloc[0], digits)


def _with_limits(row: pd.Series, digits: int = 3) -> str:
    value = f"{row['difference']:+.{digits}f}"
    if pd.isna(row["difference_low"]):
        return f"{value} (no interval)"
    low, high = (f"{row[f'difference_{side}']:+.{digits}f}" for side in ("low", "high"))
    return f"{value} (95% interval {low} to {high})"


def _clear(single: pd.DataFrame) -> str:
    tested = single[single["p_corrected"].notna()]
    if tested.empty:
        return "No single pair of domains can be tested."
    clear = tested[tested["p_corrected"] <= SIGNIFICANT]
    return (
        f"Of {len(tested)} pairs of domains, {int((clear['difference'] > 0).sum())} are worse and "
        f"{int((clear['difference'] < 0).sum())} better than in the domain itself beyond chance "
        "(over documents and adapters, Holm)."
    )


def _range(values: pd.Series, digits: int = 3) -> str:
    return f"{values.min():.{digits}f} to {values.max():.{digits}f}"
