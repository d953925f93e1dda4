"""Domain by domain: means over source experts, with intervals over documents."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from numpy import ndarray as Array
from scipy.special import stdtr

from moescope.corpora.corpus import RESERVED_DOMAIN
from moescope.measures.bootstrap import FEWEST_UNITS
from moescope.measures.jackknife import GROUPS, limits
from moescope.measures.multiple_tests import holm

ELSEWHERE = "other domains (mean)"
"""In tables: the mean over adapters that were trained on each of the other domains."""
Estimates = Float[Array, " estimates"]
"""A value on all documents, then without each of `GROUPS` groups of them."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Matrix:
    """A ratio of sums for every domain to train on and to test on."""

    domains: Sequence[str]
    """To train on and to test on."""
    cells: Mapping[tuple[str, str], Estimates]
    """By trained on, "all" among them, and tested on: the mean over source experts."""
    basis: Mapping[str, dict[str, int]]
    """Documents and tokens by domain tested on."""

    @classmethod
    def of(cls, rows: pd.DataFrame, domains: Sequence[str], value: str, over: str) -> "Matrix":
        """From sums by document.

        Args:
            rows: source, trained_on, tested_on, document, tokens, and the two columns.
            domains: Their order.
            value: Column of the numerators.
            over: Column of the denominators.
        """
        cells, basis = {}, {}
        for tested, here in rows.groupby("tested_on"):
            documents = np.sort(here["document"].unique())
            group = pd.Series(np.arange(len(documents)) % GROUPS, index=documents)
            for trained, own in here.groupby("trained_on"):
                cells[str(trained), str(tested)] = np.mean(
                    [
                        _ratios(some, group[some["document"]].to_numpy(), value, over)
                        for _, some in own.groupby("source")
                    ],
                    axis=0,
                )
            counted = ["document"] if over == "tokens" else ["source", "document"]
            tokens = here.drop_duplicates(counted)["tokens"].sum()
            basis[str(tested)] = {"n_tokens": int(tokens), "n_documents": len(documents)}
        return cls(domains=domains, cells=cells, basis=basis)

    def values(self) -> Iterator[dict[str, Any]]:
        """One row per cell, with its 95% limits over documents."""
        for trained in (*self.domains, RESERVED_DOMAIN):
            for tested in self.domains:
                found = self.cells[trained, tested]
                low, high = _limits(found, self._documents(tested))
                yield {
                    "trained_on": trained,
                    "tested_on": tested,
                    "value": float(found[0]),
                    "value_low": low,
                    "value_high": high,
                    **self._basis(tested),
                }

    def differences(self) -> list[dict[str, Any]]:
        """What an adapter loses against one that was trained on the domain it is tested on.

        Of each domain, of the mean over the others, and of all domains at as many tokens; by domain
        tested on, and their mean ("all"). p-values are corrected over all rows.
        """
        rows = []
        for trained in (*self.domains, ELSEWHERE, RESERVED_DOMAIN):
            found = {
                tested: self._trained(trained, tested) - self.cells[tested, tested]
                for tested in self.domains
                if tested != trained
            }
            if trained not in self.domains:
                found[RESERVED_DOMAIN] = np.mean(list(found.values()), axis=0)
            for tested, estimates in found.items():
                low, high = _limits(estimates, self._documents(tested))
                rows.append(
                    {"trained_on": trained, "tested_on": tested, "difference": float(estimates[0])}
                    | {"difference_low": low, "difference_high": high}
                    | {"p_value": _p_value(estimates) if np.isfinite(low) else np.nan}
                    | self._basis(tested)
                )
        corrected = holm(np.array([row["p_value"] for row in rows], dtype=float))
        return [row | {"p_corrected": float(p)} for row, p in zip(rows, corrected, strict=True)]

    def _trained(self, trained: str, tested: str) -> Estimates:
        if trained != ELSEWHERE:
            return self.cells[trained, tested]
        others = [self.cells[other, tested] for other in self.domains if other != tested]
        return np.asarray(np.mean(others, axis=0))

    def _documents(self, tested: str) -> int:
        """Of the domain; of all together, of the one that has fewest."""
        if tested != RESERVED_DOMAIN:
            return self.basis[tested]["n_documents"]
        return min(basis["n_documents"] for basis in self.basis.values())

    def _basis(self, tested: str) -> dict[str, Any]:
        chosen = self.domains if tested == RESERVED_DOMAIN else [tested]
        sums = {
            name: sum(self.basis[domain][name] for domain in chosen)
            for name in ("n_tokens", "n_documents")
        }
        enough = self._documents(tested) >= FEWEST_UNITS
        return sums | {"status": "ok" if enough else "few_documents"}


def _ratios(rows: pd.DataFrame, group: Array, value: str, over: str) -> Estimates:
    """Sum over sum, with and without each group of documents."""
    sums = np.zeros((GROUPS, 2))
    np.add.at(sums, group, rows[[value, over]].to_numpy(float))
    total = sums.sum(0)
    left = np.concatenate([total[None], total - sums])
    return np.asarray(left[:, 0] / left[:, 1])


def _limits(found: Estimates, documents: int) -> tuple[float, float]:
    if documents < FEWEST_UNITS:
        return np.nan, np.nan
    low, high = limits(found)
    return float(low), float(high)


def _p_value(found: Estimates) -> float:
    """Two-sided, by the error and the t quantile of the limits."""
    rest = found[1:]
    error = np.sqrt((len(rest) - 1) / len(rest) * np.square(rest - rest.mean()).sum())
    if error == 0:
        return 0.0 if found[0] else 1.0
    return float(2 * stdtr(len(rest) - 1, -abs(found[0]) / error))
