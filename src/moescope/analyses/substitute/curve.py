"""How the loss rises as experts are taken out together, and what that saves."""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from moescope.analyses.fits import Source
from moescope.analyses.losses import Losses
from moescope.analyses.substitute.removal import Gone, removals, tried_counts
from moescope.analyses.substitute.sources import decoder_layers
from moescope.analyses.substitute.stand_ins import By, Choices, Kind
from moescope.analyses.substitute.tables import losses_with
from moescope.evaluate.totals import Resampling, counts, difference_columns, mean_columns
from moescope.models.view import MoEModel
from moescope.progress import track

DRAWN: tuple[By, ...] = ("zero", "linear", "best", "drawn", "random")
"""What stands in for experts that are taken out together."""
_KIND = ["by", "form", "draw"]


def curve_table(
    model: MoEModel,
    choices: Mapping[Source, Choices],
    sizes: Mapping[Source, float],
    losses: Losses,
    most: float,
    resampling: Resampling,
) -> pd.DataFrame:
    """One row per kind of stand-in and number of experts, until the loss has risen by enough.

    Args:
        model: The model.
        choices: What may stand in for each expert.
        sizes: Of each expert, what an FVU of 1 costs.
        losses: Of the held-out documents.
        most: Rise of the loss, as a share of it, above which no more are taken out.
        resampling: Of the intervals.

    Returns:
        by, form, draw; removed, the number of experts; experts, which; parameters of theirs that
        go, adapter_parameters that come, saved, the difference; saved_share, as a share of all
        routed experts; loss, difference from the model as it is, and rise, rise_low, rise_high,
        that as a share of the loss of the model as it is.
    """
    unchanged = losses.unchanged
    total = _routed_parameters(model)
    before = unchanged["loss"].sum() / unchanged["tokens"].sum()
    rows = []
    for kind in track(_kinds(choices), "substitute: curves"):
        possible = {source: each[kind] for source, each in choices.items()}
        tried = tried_counts(len(possible))
        for gone in removals(possible, sizes):
            if len(gone) not in tried:
                continue
            documents = losses_with(losses, list(gone.values()))
            row = {name: getattr(kind, name) for name in _KIND} | _saved(model, gone, total)
            row |= mean_columns(documents, ["loss"], resampling)
            change = difference_columns(documents, "difference", resampling)
            row |= change
            row |= {name.replace("difference", "rise"): v / before for name, v in change.items()}
            rows.append(row | counts(documents, resampling))
            if change["difference"] > most * before:
                break
    return pd.DataFrame(rows).astype({"draw": "Int64"})


def reach_table(curve: pd.DataFrame, thresholds: Sequence[float]) -> pd.DataFrame:
    """How many experts go before the loss has risen by a threshold.

    Returns:
        One row per kind and threshold. removed, the most experts that were tried, with all smaller
        numbers too, up to which the rise stays within; sure, the same of the upper end of its
        interval (nothing without one); saved, saved_share at `removed`; next_tried, the number
        with which the rise is above, nothing where none was.
    """
    rows = []
    for names, points in curve.groupby(_KIND, dropna=False, sort=False):
        for threshold in thresholds:
            within = _leading(points[points["rise"] <= threshold], points)
            sure = _leading(points[points["rise_high"] <= threshold], points)
            last = within.iloc[-1] if len(within) else None
            above = points.iloc[len(within) :]
            rows.append(
                dict(zip(_KIND, names, strict=True))
                | {
                    "threshold": threshold,
                    "removed": _most(within),
                    "sure": _most(sure) if points["rise_high"].notna().any() else pd.NA,
                    "next_tried": above["removed"].min() if len(above) else pd.NA,
                    "saved": 0 if last is None else last["saved"],
                    "saved_share": 0.0 if last is None else last["saved_share"],
                    "n_documents": points["n_documents"].iloc[0],
                }
            )
    return pd.DataFrame(rows).astype({"draw": "Int64", "sure": "Int64", "next_tried": "Int64"})


def _most(points: pd.DataFrame) -> int:
    return int(points["removed"].max()) if len(points) else 0


def _leading(chosen: pd.DataFrame, points: pd.DataFrame) -> pd.DataFrame:
    """Those of the points that are chosen with all before them."""
    there = points.index.isin(chosen.index)
    return points[there.cumprod().astype(bool)]


def _kinds(choices: Mapping[Source, Choices]) -> list[Kind]:
    """Those that every expert has."""
    first, *others = choices.values()
    return [k for k in first if k.by in DRAWN and all(k in each for each in others)]


def _routed_parameters(model: MoEModel) -> int:
    layers = decoder_layers(model, ())
    return sum(_expert_parameters(model, la.index) * la.num_experts for la in layers)


def _expert_parameters(model: MoEModel, layer: int) -> int:
    return model.layer(layer).expert_weights(0).num_parameters


def _saved(model: MoEModel, gone: Gone, total: int) -> dict[str, Any]:
    parameters = sum(_expert_parameters(model, source.layer) for source in gone)
    adapters = sum(stand_in.adapter_parameters for stand_in in gone.values())
    return {
        "removed": len(gone),
        "experts": " ".join(str(source) for source in sorted(gone)),
        "parameters": parameters,
        "adapter_parameters": adapters,
        "saved": parameters - adapters,
        "saved_share": (parameters - adapters) / total,
    }
