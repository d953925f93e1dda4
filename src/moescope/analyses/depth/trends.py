"""Whether a curve over depth rises or falls, and whether its last layer stands apart."""

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy.stats import kendalltau

from moescope.measures.multiple_tests import holm
from moescope.runs import Finding

SIGNIFICANT = 0.05
"""Of p-values after Holm's correction over all curves."""
ROUNDING = 1e-6
"""Part of a value that is not told from rounding, which fp32 sums leave in equal experts."""
FEWEST_LAYERS = 4
"""Below it no order of the layers is rarer than 1 in 10."""


def trend_table(curves: pd.DataFrame) -> pd.DataFrame:
    """One row per curve: does its value rise or fall with the layer?

    The test is that of Mann (1945) and Kendall: tau between layer and value, with the exact p-value
    over all orders of the layers, two-sided. Layers are the units; that neighbours resemble each
    other makes it reject too often, that values are themselves uncertain too seldom.

    Returns:
        analysis, measure, stack, layers; first, last, value of the first and last layer; tau,
        p_value; p_corrected (Holm 1979, over all curves); tau_without_last; last_outside, whether
        the last value lies beyond all the others; status, `few_layers` where there is no p-value.
    """
    by = ["analysis", "measure", "stack"]
    rows = [
        dict(zip(by, names, strict=True))
        | _trend(curve.sort_values("layer")["value"].to_numpy(float))
        for names, curve in curves.groupby(by, sort=False)
    ]
    table = pd.DataFrame(rows)
    table["p_corrected"] = holm(table["p_value"].to_numpy(float))
    return table


def _trend(values: Float[np.ndarray, " layers"]) -> dict[str, object]:
    row = {"layers": len(values), "first": values[0], "last": values[-1]}
    if len(values) < FEWEST_LAYERS:
        return row | {"tau": np.nan, "p_value": np.nan, "status": "few_layers"}
    tau, p_value = _kendall(values)
    before = values[:-1]
    return row | {
        "tau": tau,
        "p_value": p_value,
        "tau_without_last": _kendall(before)[0],
        "last_outside": bool(values[-1] > before.max() or values[-1] < before.min()),
        "status": "ok",
    }


def _kendall(values: Float[np.ndarray, " layers"]) -> tuple[float, float]:
    """Tau and p against the layers' order; 0 and 1 where values differ by rounding at most."""
    if np.ptp(values) <= ROUNDING * np.abs(values).max():
        return 0.0, 1.0
    found = kendalltau(np.arange(len(values)), values)
    return float(found.statistic), float(found.pvalue)


def findings(trends: pd.DataFrame) -> list[Finding]:
    """How many curves have a trend, and which."""
    tested = trends[trends["status"] == "ok"]
    if tested.empty:
        text = f"No trend over depth is tested: fewer than {FEWEST_LAYERS} layers."
        return [Finding(text=text, numbers={"curves": len(trends)})]
    sure = tested[tested["p_corrected"] < SIGNIFICANT]
    numbers: dict[str, float | int | str] = {"curves": len(tested), "trends": len(sure)}
    text = (
        f"Of {len(tested)} measures {len(sure)} rise or fall with depth beyond what a random "
        f"order of the layers gives (Kendall's tau, exact p < {SIGNIFICANT} after Holm's "
        "correction). Layers are the units of this test; neighbours are not independent."
    )
    return [Finding(text=text, numbers=numbers), *(_sentence(row) for row in _records(sure))]


def _records(frame: pd.DataFrame) -> list[dict[str, object]]:
    return [{str(name): value for name, value in row.items()} for row in frame.to_dict("records")]


def _sentence(row: dict[str, object]) -> Finding:
    way = "rises" if float(str(row["tau"])) > 0 else "falls"
    text = (
        f"{row['measure']} ({row['analysis']}, {row['stack']}) {way} from {row['first']:.3g} to "
        f"{row['last']:.3g}: tau {row['tau']:.2f} over {row['layers']} layers, "
        f"{row['tau_without_last']:.2f} without the last, corrected p {row['p_corrected']:.2g}."
    )
    kept = ("tau", "tau_without_last", "p_corrected", "layers", "first", "last")
    return Finding(text=text, numbers={name: float(str(row[name])) for name in kept})
