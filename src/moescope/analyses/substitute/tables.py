"""Table of `substitute`: losses by stand-in."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from moescope.analyses.fits import Source
from moescope.analyses.losses import Losses, by_domain, entered
from moescope.analyses.substitute.stand_ins import Kind, StandIn
from moescope.evaluate.totals import Resampling, counts, difference_columns, mean_columns

POOLED = "all"
"""In tables: the mean over the experts that were taken out, one at a time."""
Chosen = Mapping[Source, Mapping[Kind, StandIn]]
"""What stands in for each expert by kind."""


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
        self._known: dict[tuple[Source, Kind], pd.DataFrame] = {}

    def sums(self, source: Source | None, kind: Kind) -> pd.DataFrame:
        """Tokens, loss and difference by document; None: the mean over the sources.

        Random experts without the number of a draw are the mean over the draws.
        """
        sources = self.chosen if source is None else [source]
        kinds = self.draws(kind)
        frames = [self._one(s, k) for s in sources for k in kinds]
        mean: pd.DataFrame = sum(frames[1:], frames[0]) / len(frames)
        return mean

    def _one(self, source: Source, kind: Kind) -> pd.DataFrame:
        if (source, kind) not in self._known:
            found = losses_with(self.losses, [self.chosen[source][kind]])
            self._known[source, kind] = found
        return self._known[source, kind]

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
        for kind in with_means(measured.kinds):
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


def with_means(kinds: Sequence[Kind]) -> list[Kind]:
    """Kinds, with the mean over the draws of random experts before the first of them."""
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


def losses_with(losses: Losses, stand_ins: Sequence[StandIn]) -> pd.DataFrame:
    """With these in the place of their sources, all at once; see `Losses.of`."""
    name = "+".join(sorted(stand_in.name for stand_in in stand_ins))
    return losses.of(name, lambda: entered([stand_in.enter() for stand_in in stand_ins]))
