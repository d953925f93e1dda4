"""Tables of `substitute`: losses by stand-in, and stand-ins against one another."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from moescope.analyses.fits import Source
from moescope.analyses.losses import Losses, by_domain
from moescope.analyses.substitute.stand_ins import By, Kind, StandIn, losses_with
from moescope.evaluate.totals import Resampling, counts, difference_columns, mean_columns
from moescope.measures.bootstrap import FEWEST_UNITS
from moescope.measures.decisions import zero_mean_p_value
from moescope.measures.multiple_tests import holm

POOLED = "all"
"""In tables: the mean over the experts that were taken out, one at a time."""
Chosen = Mapping[Source, Mapping[Kind, StandIn]]
"""What stands in for each expert by kind."""
COMPARED: tuple[tuple[By, By], ...] = (
    ("best", "zero"),
    ("best", "mean"),
    ("best", "linear"),
    ("drawn", "random"),
    ("drawn", "same_layer"),
)
"""What is held against what: random experts and those of the same layer against the best of
equally many experts of other layers."""
_LEVEL = 0.05


class Measured:
    """Sums per document of everything that stands in for one expert at a time.

    Args:
        chosen: What stands in.
        losses: Of the held-out documents.
    """

    def __init__(self, chosen: Chosen, losses: Losses) -> None:
        self.chosen, self.losses = chosen, losses
        first, *others = [set(each) for each in chosen.values()]
        order = next(iter(chosen.values()))
        self.kinds = [kind for kind in order if kind in first.intersection(*others)]
        """Those that every expert has."""

    def sums(self, source: Source | None, kind: Kind) -> pd.DataFrame:
        """Tokens, loss and difference by document; None: the mean over the sources.

        Random experts without the number of a draw are the mean over the draws.
        """
        sources = self.chosen if source is None else [source]
        kinds = self.draws(kind)
        frames = [losses_with(self.losses, [self.chosen[s][k]]) for s in sources for k in kinds]
        mean: pd.DataFrame = sum(frames[1:], frames[0]) / len(frames)
        return mean

    def draws(self, kind: Kind) -> list[Kind]:
        """The draws that a kind without a number stands for; itself, if there are none."""
        if kind.by != "random" or kind.draw is not None:
            return [kind]
        return [k for k in self.kinds if k._replace(draw=None) == kind]


def loss_table(measured: Measured, resampling: Resampling) -> pd.DataFrame:
    """One row per expert, stand-in and domain, and those of the mean over the experts.

    Returns:
        source, by, form, draw, tuned; target, candidates (how many it was chosen from), inner_fvu,
        fvu, adapter_parameters of the stand-in (of the mean over experts, means), underdetermined
        (whether any is); domain; loss; difference from the model as it is; of_zero, that as a
        share of what zero-ablation costs.
    """
    rows = []
    for source in (None, *measured.chosen):
        zero = measured.sums(source, Kind("zero"))
        for kind in _with_means(measured.kinds):
            facts = _facts(measured, source, kind)
            sums = measured.sums(source, kind)
            for domain, documents in by_domain(sums).items():
                row = facts | {"domain": domain}
                row |= mean_columns(documents, ["loss"], resampling)
                row |= difference_columns(documents, "difference", resampling)
                lost = by_domain(zero)[domain]["difference"].sum()
                row["of_zero"] = documents["difference"].sum() / lost if lost > 0 else np.nan
                rows.append(row | counts(documents, resampling))
    return pd.DataFrame(rows).astype({"draw": "Int64"})


def _with_means(kinds: Sequence[Kind]) -> list[Kind]:
    """With the mean over the draws of random experts before the first of them."""
    found = dict[Kind, None]()
    for kind in kinds:
        found |= {kind._replace(draw=None): None, kind: None}
    return list(found)


def _facts(measured: Measured, source: Source | None, kind: Kind) -> dict[str, Any]:
    sources = list(measured.chosen) if source is None else [source]
    used = [measured.chosen[s][k] for s in sources for k in measured.draws(kind)]
    target = str(used[0].target) if len(used) == 1 and used[0].target is not None else ""
    return {
        "source": POOLED if source is None else str(source),
        **kind._asdict(),
        "target": target,
        "candidates": max(one.candidates for one in used),
        "inner_fvu": float(np.mean([one.inner_fvu for one in used])),
        "fvu": float(np.mean([one.fvu for one in used])),
        "adapter_parameters": float(np.mean([one.adapter_parameters for one in used])),
        "underdetermined": any(one.underdetermined for one in used),
    }


def against_table(measured: Measured, resampling: Resampling) -> pd.DataFrame:
    """Stand-ins against one another, on the same tokens of all domains.

    Returns:
        One row per expert (and the mean over them) and comparison. difference, of the losses, with
        its interval; least and most of it over the draws of random experts; p_value, two-sided;
        p_corrected, by Holm among the comparisons of the mean, and among those of all experts one
        by one; verdict: "better" or "worse", "open" where neither can be told, or nothing under 30
        documents. Random experts have to be on the same side in every draw.
    """
    tables = []
    for sources in ([None], list(measured.chosen)):
        rows = [row for source in sources for row in _comparisons(measured, source, resampling)]
        table = pd.DataFrame(rows)
        if rows:
            table["p_corrected"] = holm(table["p_value"].to_numpy())
            table["verdict"] = [_verdict(row) for _, row in table.iterrows()]
        tables.append(table)
    return pd.concat(tables, ignore_index=True)


def _comparisons(
    measured: Measured, source: Source | None, resampling: Resampling
) -> Iterator[dict[str, Any]]:
    present = _with_means(measured.kinds)
    for kind in present:
        for by, than in COMPARED:
            other = Kind(than, kind.form if than in ("random", "same_layer") else "")
            # What has no adapter is the same before and after adapters were trained further.
            other = other._replace(tuned=kind.tuned and than not in ("zero", "mean"))
            if kind.by != by or other not in present:
                continue
            own = measured.sums(source, kind)
            frames = [measured.sums(source, k) for k in measured.draws(other)]
            rest = measured.sums(source, other)
            own = own.assign(difference=own["loss"] - rest["loss"])
            tokens = own["tokens"].sum()
            each = [(own["loss"] - frame["loss"]).sum() / tokens for frame in frames]
            enough = len(own) >= FEWEST_UNITS
            p_value = zero_mean_p_value(own["difference"].to_numpy()) if enough else np.nan
            yield {
                "source": POOLED if source is None else str(source),
                "form": kind.form,
                "tuned": kind.tuned,
                "by": by,
                "than": than,
                **difference_columns(own, "difference", resampling),
                "least": min(each),
                "most": max(each),
                "draws": len(each),
                "p_value": p_value,
                **counts(own, resampling),
            }


def _verdict(row: pd.Series) -> str:
    if np.isnan(row["p_corrected"]):
        return ""
    if row["p_corrected"] < _LEVEL:
        if row["most"] < 0:
            return "better"
        if row["least"] > 0:
            return "worse"
    return "open"
