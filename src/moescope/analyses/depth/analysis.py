"""Every measure of layers as a curve over depth, on one page (A Closer Look into MoE)."""

from dataclasses import dataclass
from typing import Any

import pandas as pd

from moescope.analyses.depth.trends import findings, trend_table
from moescope.analyses.material import Material
from moescope.analyses.registry import all_analyses, analysis
from moescope.errors import MoEScopeError
from moescope.runs import Result, Run


@dataclass(frozen=True, kw_only=True)
class DepthOptions:
    """Options of `depth`: it has none, what it shows is set where it is measured."""


def of_results(material: Material, _: DepthOptions) -> dict[str, Any]:
    """What the curves rest on: the results that hold them, by where these come from."""
    known = all_analyses()
    provenance = {
        name: dict(material.run.result(name).provenance)
        for name in material.run.results()
        if name in known and known[name].curves
    }
    models = {told["model"] for told in provenance.values() if "model" in told}
    return {"model": ", ".join(sorted(models)), "results": provenance}


@analysis(
    question="Which measures rise or fall from the first layer to the last?",
    source="A Closer Look into MoE (similarity by depth); trend tests ours",
    needs=set(),
    options=DepthOptions,
    basis=of_results,
)
def depth(material: Material, _: DepthOptions) -> Result:
    """Curves over depth of all results of the run, and whether they have a trend."""
    curves = layer_curves(material.run)
    if curves.empty:
        raise MoEScopeError(
            f"{material.run.path} holds no measure of layers",
            got=", ".join(material.run.results()) or "no results",
            expected="a result of " + ", ".join(n for n, a in all_analyses().items() if a.curves),
            remedy="Run one of these first",
        )
    trends = trend_table(curves)
    return Result(
        name="depth", tables={"depth": curves, "trends": trends}, findings=findings(trends)
    )


def layer_curves(run: Run) -> pd.DataFrame:
    """The curves that the results of a run hold, in the order of the analyses' names.

    Returns:
        One row per analysis, measure, stack and layer: value, its 95% limits (low, high) where
        they were measured, n_tokens, n_documents, and whether the layer is the last of its stack.
    """
    known = all_analyses()
    frames = [
        curve.read(result).assign(analysis=name)
        for name in run.results()
        if name in known and known[name].curves
        for result in [run.result(name)]
        for curve in known[name].curves
    ]
    if not frames:
        return pd.DataFrame()
    table = pd.concat(frames, ignore_index=True)
    table = table[table["value"].notna()].reset_index(drop=True)
    table["last"] = table["layer"] == table.groupby("stack")["layer"].transform("max")
    return table[["analysis", *table.columns.drop("analysis")]]
