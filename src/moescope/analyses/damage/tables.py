"""Tables of `damage`: every change, every measure against them, measures against each other."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int

from moescope.analyses.damage.correlation import (
    Damage,
    Estimates,
    correlation,
    difference,
    interval,
    permuted,
    rank_correlation,
)
from moescope.analyses.damage.measures import MEASURES
from moescope.analyses.damage.trials import KINDS, Kind, Trial
from moescope.evaluate.totals import Resampling, counts, difference_columns
from moescope.measures.bootstrap import resampled_counts
from moescope.measures.multiple_tests import holm

RESAMPLES = 200
"""Of the documents, behind the error of each correlation."""
_FEWEST = 3
"""Changes below which nothing is put in order."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Measured:
    """Changes of one kind: what they cost, and what was known of them before."""

    kind: Kind
    """What was done."""
    trials: Sequence[Trial]
    """The changes."""
    documents: pd.DataFrame
    """domain and tokens by document."""
    rises: Float[np.ndarray, "documents changes"]
    """Sums over the tokens of each document of the rise of the loss, in nats."""
    measures: pd.DataFrame
    """Columns of `MEASURES`, one row per change."""

    def damage(self, pooled: bool, seed: int) -> Damage:
        """What the changes cost, on all documents and on resamples of them."""
        number = len(self.documents)
        drawn = resampled_counts(number, RESAMPLES, np.random.default_rng(seed))
        counts_of = np.concatenate([np.ones((1, number)), drawn])
        tokens = self.documents["tokens"].to_numpy(float)
        return Damage(
            estimates=(counts_of @ self.rises) / (counts_of @ tokens)[:, None],
            strata=self.strata(pooled),
            documents=number,
        )

    def strata(self, pooled: bool) -> Int[np.ndarray, " changes"]:
        """Which changes are put in order together."""
        return np.array([0 if pooled else trial.stratum for trial in self.trials])

    def columns(self) -> Iterator[tuple[str, Float[np.ndarray, " changes"]]]:
        """Measures that are known of at least some, turned so that more means more damage."""
        for name, measure in MEASURES.items():
            values = measure.sign * self.measures[name].to_numpy(float)
            if np.isfinite(values).sum() >= _FEWEST:
                yield name, values

    @property
    def basis(self) -> dict[str, Any]:
        """How much all of it rests on."""
        return {
            "n_changes": len(self.trials),
            "n_experts": len({e for trial in self.trials for e in trial[1:3] if e is not None}),
            "n_tokens": int(self.documents["tokens"].sum()),
            "n_documents": len(self.documents),
        }


def changes_table(measured: Sequence[Measured], resampling: Resampling) -> pd.DataFrame:
    """One row per change: rise of the loss with its paired interval, and every measure."""
    rows = []
    for kind in measured:
        known = kind.measures.to_dict("records")
        for number, trial in enumerate(kind.trials):
            sums = pd.DataFrame({"tokens": kind.documents["tokens"]})
            sums["rise"] = kind.rises[:, number]
            other = trial.other or (None, None)
            rows.append(
                {"kind": trial.kind, "layer": trial.one.layer, "expert": trial.one.expert}
                | {"other_layer": other[0], "other_expert": other[1], "stratum": trial.stratum}
                | difference_columns(sums, "rise", resampling)
                | counts(sums, resampling)
                | known[number]
            )
    return pd.DataFrame(rows).astype({"other_layer": "Int64", "other_expert": "Int64"})


def correlation_tables(
    measured: Sequence[Measured], seed: int
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Every measure against the damage, and every two measures against each other.

    Within layers: changes are put in order within a layer, or within a draw of pairs of the same
    two layers; pooled: all together. p-values are corrected over the measures, and over the pairs
    of measures, of each kind of change.
    """
    rows, versus = [], []
    for kind in measured:
        for pooled in (False, True):
            place = {"kind": kind.kind, "ranks": "pooled" if pooled else "within layers"}
            found = _Correlations(kind, kind.damage(pooled, seed), seed)
            rows += _corrected([place | row for row in found.rows()])
            versus += _corrected([place | row for row in found.differences()])
    return pd.DataFrame(rows).assign(seed=seed), pd.DataFrame(versus).assign(seed=seed)


class _Correlations:
    """All measures against the damage of one kind of change."""

    def __init__(self, kind: Measured, damage: Damage, seed: int) -> None:
        self.kind, self.damage, self.seed = kind, damage, seed
        self.values = dict(kind.columns())
        self._found: dict[tuple[str, bytes], Estimates] = {}

    def rows(self) -> Iterator[dict[str, Any]]:
        """One per measure."""
        for name, values in self.values.items():
            known = np.isfinite(values)
            estimates, damage = self._of(name, known), self.damage.where(known)
            found = interval(estimates, permuted(estimates, values[known], damage, self.seed))
            yield {
                "measure": name,
                "correlation": found.value,
                "correlation_low": found.low,
                "correlation_high": found.high,
                "p_value": found.p_value,
                **self.kind.basis,
                "n_changes": int(known.sum()),
                "status": found.status,
            }

    def differences(self) -> Iterator[dict[str, Any]]:
        """One per pair of measures, over the changes for which both are known."""
        for one, other in combinations(self.values, 2):
            known = np.isfinite(self.values[one]) & np.isfinite(self.values[other])
            if known.sum() < _FEWEST:
                continue
            found = difference(self._of(one, known), self._of(other, known))
            yield {
                "measure": one,
                "other": other,
                "difference": found.value,
                "difference_low": found.low,
                "difference_high": found.high,
                "p_value": found.p_value,
                "n_changes": int(known.sum()),
                "status": found.status,
            }

    def _of(self, name: str, known: Bool[np.ndarray, " changes"]) -> Estimates:
        key = name, known.tobytes()
        if key not in self._found:
            self._found[key] = correlation(self.values[name][known], self.damage.where(known))
        return self._found[key]


def _corrected(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    p_values = holm(np.array([row["p_value"] for row in rows], dtype=float))
    return [row | {"p_corrected": float(p)} for row, p in zip(rows, p_values, strict=True)]


def reliability_table(measured: Sequence[Measured], halves: int, seed: int) -> pd.DataFrame:
    """How far the order of the damage is settled: two halves of the documents against each other.

    Returns:
        agreement, mean rank correlation of the damage on two random halves of each domain's
        documents; ceiling, about the most that a measure which knew the damage on endless text
        could reach here: the square root of the agreement of two texts of the whole size (Spearman
        and Brown).
    """
    rows = []
    for kind in measured:
        for pooled in (False, True):
            found = [
                rank_correlation(*_halves(kind, [seed, draw]), kind.strata(pooled))
                for draw in range(halves)
            ]
            agreement = float(np.mean(found))
            whole = max(2 * agreement / (1 + agreement), 0.0) if agreement > -1 else 0.0
            rows.append(
                {"kind": kind.kind, "ranks": "pooled" if pooled else "within layers"}
                | {"agreement": agreement, "ceiling": whole**0.5, "halves": halves}
                | kind.basis
                | {"seed": seed}
            )
    return pd.DataFrame(rows)


def _halves(
    kind: Measured, seed: Sequence[int]
) -> tuple[Float[np.ndarray, " changes"], Float[np.ndarray, " changes"]]:
    """Damage on two halves of the documents of each domain."""
    order = np.random.default_rng(seed).permutation(len(kind.documents))
    by_domain = order[kind.documents["domain"].to_numpy()[order].argsort(kind="stable")]
    tokens = kind.documents["tokens"].to_numpy(float)
    first, second = (
        kind.rises[h].sum(0) / tokens[h].sum() for h in (by_domain[::2], by_domain[1::2])
    )
    return first, second


def by_kind(
    trials: Sequence[Trial],
    losses: Mapping[Trial, pd.DataFrame],
    known: Mapping[Kind, pd.DataFrame],
) -> list[Measured]:
    """What was measured, by kind of change; changes that could not be made are left out.

    Args:
        trials: All of them.
        losses: Sums by document of those that could be made.
        known: Measures by kind, one row per change, named as `Trial.where` has it.
    """
    found = []
    for kind in KINDS:
        made = [trial for trial in trials if trial.kind == kind and trial in losses]
        if len(made) < _FEWEST:
            continue
        frames = [losses[trial] for trial in made]
        found.append(
            Measured(
                kind=kind,
                trials=made,
                documents=frames[0].reset_index()[["domain", "tokens"]],
                rises=np.stack([frame["difference"].to_numpy() for frame in frames], axis=1),
                measures=known[kind].loc[[trial.where for trial in made]],
            )
        )
    return found
