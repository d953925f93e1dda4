"""What learning curves and capacity curves say in words."""

import pandas as pd

from moescope.analyses.align.parts import PAIR
from moescope.runs import Finding

_CURVES = {"fvu": "pairs", "fvu_linear": "linear map", "fvu_random": "random experts"}


def learning_findings(learning: pd.DataFrame) -> list[Finding]:
    """What more tokens would bring: errors on the fewest, on half, and on all of them."""
    measured = learning if learning.empty else learning[learning.fvu.notna()]
    if measured.empty:
        return []
    ordered = measured.sort_values("n_train", kind="stable").groupby(PAIR)
    half = ordered.nth(-2).set_index(PAIR)
    if half.empty:
        return []
    least = ordered.nth(0).set_index(PAIR).loc[half.index]
    most = ordered.nth(-1).set_index(PAIR).loc[half.index]
    known = {name: words for name, words in _CURVES.items() if most[name].notna().any()}
    course = [
        f"{least[name].median():.2f} to {most[name].median():.2f} ({words})"
        for name, words in known.items()
    ]
    change = {name: float((most[name] - half[name]).median()) for name in known}
    last = [f"{change[name]:+.3f} ({words})" for name, words in known.items()]
    text = (
        f"From {least.n_train.median():,.0f} to {most.n_train.median():,.0f} training tokens the "
        f"held-out FVU goes from {', '.join(course)}; the last step alone, from "
        f"{half.n_train.median():,.0f} tokens, changes it by {', '.join(last)}: medians over "
        f"{len(half)} pairs.{_forms(measured)}"
    )
    return [
        Finding(text=text, numbers={f"last_step_{name}": value for name, value in change.items()})
    ]


def _forms(measured: pd.DataFrame) -> str:
    """A warning where not all points of a curve are about the same adapter."""
    if (measured.form == measured.form.iloc[0]).all():
        return ""
    return (
        " With fewer tokens than four times the hidden size the adapters are of low rank, so that "
        "not all of this is due to the tokens."
    )


def capacity_findings(capacity: pd.DataFrame) -> list[Finding]:
    """Whether the real experts do better than random ones at equal size of the adapter."""
    if capacity.empty:
        return []
    pairs = capacity.groupby(PAIR)[["advantage", "parameters_saved"]].first()
    random = int(capacity.seed.nunique())
    lowest = int(_real_is_lowest(capacity).sum())
    saved = pairs.parameters_saved[pairs.parameters_saved > 1]
    text = (
        f"At equal size of the adapter, the imitating expert leaves less FVU than each of {random} "
        f"random experts with its down projection in {lowest} of {len(pairs)} pairs (mean over "
        f"sizes; about {len(pairs) / (random + 1):.1f} would by chance). The advantage over their "
        f"mean is {pairs.advantage.median():+.3f} in the median, {pairs.advantage.min():+.3f} to "
        f"{pairs.advantage.max():+.3f} in all."
    )
    if len(saved):
        text += (
            f" In {len(saved)} of {len(pairs)} pairs it needs fewer parameters for what random "
            f"experts reach with the full matrix, at best {saved.max():.1f} times fewer."
        )
    numbers = {
        "pairs": len(pairs),
        "below_all_random": lowest,
        "median_advantage": float(pairs.advantage.median()),
    }
    return [Finding(text=text, numbers=numbers)]


def _real_is_lowest(capacity: pd.DataFrame) -> "pd.Series[bool]":
    """By pair, whether the mean FVU over sizes is below that of every random expert."""
    random = capacity[capacity.kind == "random"].groupby([*PAIR, "seed"]).fvu.mean()
    real = capacity[capacity.kind == "real"].groupby(PAIR).fvu.mean()
    return real < random.groupby(PAIR).min()
