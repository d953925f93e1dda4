"""The measures of several runs side by side: checkpoints of one training, sizes, relatives."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from numpy import ndarray as Array
from scipy.special import ndtr

from moescope.analyses.depth.analysis import layer_curves
from moescope.captures.partial import MANIFEST
from moescope.errors import OptionError
from moescope.measures import intervals
from moescope.measures.multiple_tests import holm
from moescope.runs import Finding, Result, Run, library_versions, read_json

RESULT = "compare"
"""Name of the result."""
MEAN = "mean"
"""In place of a layer's number: the mean over all layers of its stack."""
MOST_SENTENCES = 12
"""Measures that findings speak of, those that differ most against their interval first."""
SIGNIFICANT = 0.05
"""Of p-values after Holm's correction over all measures and runs."""
Z95 = 1.959964
_BY = ["analysis", "measure", "stack"]


def compare(runs: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str]) -> Run:
    """Put every measure of layers that all runs hold side by side, each against the first run.

    Args:
        runs: Run folders, at least two, in the order to be shown in.
        out: Run folder of the comparison; its result is called `compare`.

    Raises:
        OptionError: Fewer than two runs, two of one name, or no measure that all of them hold.
        MoEScopeError: A result cannot be read.
    """
    named = _named(runs)
    curves = {name: layer_curves(run) for name, run in named.items()}
    lacking = [name for name, table in curves.items() if table.empty]
    shared = set[tuple[str, ...]]()
    if not lacking:
        shared = set.intersection(*({tuple(k) for k in t[_BY].to_numpy()} for t in curves.values()))
    if not shared:
        raise OptionError(
            "the runs hold no measure of layers in common",
            got=f"none at all in {', '.join(lacking)}" if lacking else "other results in each",
            remedy="Run the same analyses on each, such as `routing`, `weights` or `outputs`",
        )
    table = side_by_side(curves, shared)
    facts = {name: _facts(run, sorted({key[0] for key in shared})) for name, run in named.items()}
    result = Result(
        name=RESULT,
        tables={RESULT: table, "runs": pd.DataFrame(_row(n, f) for n, f in facts.items())},
        findings=[*_same_ground(facts), *findings(table)],
        provenance={"runs": facts, "libraries": library_versions()},
    )
    compared = Run(out)
    result.save(compared.results_folder)
    return compared


def side_by_side(curves: Mapping[str, pd.DataFrame], shared: set[tuple[str, ...]]) -> pd.DataFrame:
    """Measures of each run, and their differences from the first.

    Args:
        curves: What `layer_curves` gives, by run.
        shared: The (analysis, measure, stack) to show.

    Returns:
        One row per run, measure and layer, and for the mean over layers one whose layer is
        `mean`. position, 0 at the first layer of the stack and 1 at the last; value, low, high;
        difference from the first run, with difference_low, difference_high, as if both runs erred
        independently; NaN where the first run has no such layer, and where either value has no
        interval. Results keep no values of single documents, or experts, that could be paired.
    """
    frames = []
    for name, table in curves.items():
        for key, curve in table.groupby(_BY, sort=False):
            if tuple(key) in shared:
                frames.append(_with_mean(curve).assign(run=name))
    rows = pd.concat(frames, ignore_index=True)
    first = rows[rows["run"] == next(iter(curves))]
    place = [*_BY, "layer"]
    base = rows[place].merge(first[[*place, "value", "low", "high"]], on=place, how="left")
    change = intervals.difference(_estimates(base), _estimates(rows))
    rows["difference"], rows["difference_low"], rows["difference_high"] = change
    rows.loc[first.index, ["difference_low", "difference_high"]] = np.nan  # against itself
    return rows[["run", *place, *rows.columns.drop(["run", *place])]]


def _with_mean(curve: pd.DataFrame) -> pd.DataFrame:
    """The rows of a curve and one for the mean over its layers, which may err together."""
    curve = curve.sort_values("layer")
    rows = curve.drop(columns="last").assign(
        layer=curve["layer"].astype(str), position=np.linspace(0, 1, len(curve))
    )
    value, low, high = (float(part) for part in intervals.mean(_estimates(curve)))
    average = rows.iloc[-1:].assign(layer=MEAN, position=np.nan, value=value, low=low, high=high)
    return pd.concat([rows, average])


def _estimates(frame: pd.DataFrame) -> intervals.Estimate:
    return intervals.Estimate(*(frame[c].to_numpy(dtype=float) for c in ("value", "low", "high")))


def _named(runs: Sequence[str | os.PathLike[str]]) -> dict[str, Run]:
    """Runs by the name of their folder."""
    named = {Path(run).resolve().name: Run(run) for run in runs}
    if len(runs) < 2 or len(named) < len(runs):
        raise OptionError(
            "cannot compare these runs",
            got=", ".join(map(str, runs)) or "none",
            expected="two or more folders of different names",
        )
    return named


def _facts(run: Run, analyses: Sequence[str]) -> dict[str, Any]:
    """What a run was made of: model, text, and the options of the analyses that are compared."""
    provenance = {name: run.result(name).provenance for name in analyses}
    some = next(iter(provenance.values()))
    manifest = run.capture_folder / MANIFEST
    return {
        "path": run.path,
        "model": some.get("model"),
        "model_fingerprint": some.get("model_fingerprint"),
        "corpus": read_json(manifest)["corpus"] if manifest.exists() else None,
        "options": {name: told.get("options") for name, told in provenance.items()},
    }


def _row(name: str, facts: Mapping[str, Any]) -> dict[str, object]:
    kept = ("path", "model", "model_fingerprint")
    return {"run": name, **{fact: str(facts[fact]) for fact in kept}}


def _same_ground(facts: Mapping[str, Mapping[str, Any]]) -> list[Finding]:
    """Whether the runs read the same text and were measured alike."""
    first, *others = facts
    texts = [name for name in others if facts[name]["corpus"] != facts[first]["corpus"]]
    unlike = sorted(
        {
            f"{analysis} in {name}"
            for name in others
            for analysis, options in facts[name]["options"].items()
            if options != facts[first]["options"][analysis]
        }
    )
    said = [f"{', '.join(texts)} read another text or packing than {first}"] if texts else []
    if unlike:
        said.append(f"measured with other options than in {first}: {', '.join(unlike)}")
    if not said:
        text = f"All {len(facts)} runs read the same text and were measured with the same options."
    else:
        text = f"Differences may be of more than the models: {'; '.join(said)}."
    return [Finding(text=text, numbers={"other_text": len(texts), "other_options": len(unlike)})]


def findings(table: pd.DataFrame) -> list[Finding]:
    """Means over layers by run, for measures whose change is clear of chance."""
    means = table[table["layer"] == MEAN]
    sure = means[_p_corrected(means) <= SIGNIFICANT]
    with_interval = means["difference_low"].notna()
    measures = means.loc[with_interval, _BY].drop_duplicates()
    text = (
        f"Of {len(measures)} measures with intervals {len(sure[_BY].drop_duplicates())} differ "
        "from the first run in their mean over layers, in some run (95%, with Holm's correction "
        f"for {int(with_interval.sum())} differences); "
        f"{len(means[_BY].drop_duplicates()) - len(measures)} have no interval. Models are one "
        "training each: intervals say nothing about another seed."
    )
    reach = (sure["difference_high"] - sure["difference_low"]).clip(lower=1e-12)
    strength = (sure["difference"].abs() / reach).groupby([sure[c] for c in _BY]).max()
    ordered = strength.sort_values(ascending=False, kind="stable").index[:MOST_SENTENCES]
    counts = {"measures": len(measures), "differ": len(strength)}
    return [Finding(text=text, numbers=counts), *(_sentence(means, key) for key in ordered)]


def _p_corrected(rows: pd.DataFrame) -> Float[Array, " rows"]:
    """Holm's p of differences, from the side of each interval that faces zero; NaN without one.

    As if errors were normal: half of a 95% interval is then 1.96 standard errors.
    """
    value, low, high = (rows[f"difference{side}"].to_numpy(float) for side in ("", "_low", "_high"))
    reach = np.where(value > 0, value - low, high - value)
    distance = np.divide(np.abs(value), reach, out=np.full_like(value, np.inf), where=reach != 0)
    distance[(reach == 0) & (value == 0)] = 0
    return holm(2 * ndtr(-Z95 * distance))


def _sentence(means: pd.DataFrame, key: Sequence[str]) -> Finding:
    analysis, measure, stack = key
    rows = means[(means[_BY] == list(key)).all(axis=1)].set_index("run")
    parts = [
        f"{run} {value:.3g}" + ("" if np.isnan(low) else f" ({low:.3g} to {high:.3g})")
        for run, value, low, high in zip(rows.index, *_estimates(rows), strict=True)
    ]
    text = f"{measure} ({analysis}, {stack}, mean over layers): {'; '.join(parts)}."
    return Finding(text=text, numbers={str(run): float(v) for run, v in rows["value"].items()})
