"""Domain by domain: means over source experts, with intervals over documents and adapters."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from moescope.analyses.ood.estimates import Estimates, estimates_of, limits, p_value
from moescope.corpora.corpus import RESERVED_DOMAIN
from moescope.measures.bootstrap import FEWEST_UNITS
from moescope.measures.jackknife import GROUPS
from moescope.measures.multiple_tests import holm

ELSEWHERE = "other domains (mean)"
"""In tables: the mean over adapters that were trained on each of the other domains."""
SAME = "same domain"
"""In tables: adapters that were trained on the domain they are tested on."""


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
            rows: source, half, trained_on, tested_on, document, tokens, and the two columns.
            domains: Their order.
            value: Column of the numerators.
            over: Column of the denominators.
        """
        cells, basis = {}, {}
        for tested, here in rows.groupby("tested_on"):
            documents = np.sort(here["document"].unique())
            group = pd.Series(np.arange(len(documents)) % GROUPS, index=documents)
            for trained, own in here.groupby("trained_on"):
                cells[str(trained), str(tested)] = estimates_of(own, group, value, over)
            counted = ["document"] if over == "tokens" else ["source", "document"]
            tokens = here.drop_duplicates(counted)["tokens"].sum()
            basis[str(tested)] = {"n_tokens": int(tokens), "n_documents": len(documents)}
        return cls(domains=domains, cells=cells, basis=basis)

    def values(self) -> Iterator[dict[str, Any]]:
        """One row per cell, with its 95% limits over documents and adapters."""
        for trained in (*self.domains, RESERVED_DOMAIN):
            for tested in self.domains:
                found = self.cells[trained, tested]
                low, high = self._limits(found, tested)
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
            rows += [
                {"trained_on": trained, "tested_on": tested} | self._difference(estimates, tested)
                for tested, estimates in found.items()
            ]
        return _corrected(rows)

    def less(self, control: "Matrix") -> list[dict[str, Any]]:
        """What an adapter misses more than a control, trained on the same domain and elsewhere.

        The mean over domains tested on; p-values are corrected over the two rows.
        """
        rows = []
        for trained in (SAME, ELSEWHERE):
            each = [
                self._trained(trained, tested) - control._trained(trained, tested)
                for tested in self.domains
            ]
            rows.append(
                {"trained_on": trained, "tested_on": RESERVED_DOMAIN}
                | self._difference(np.asarray(np.mean(each, axis=0)), RESERVED_DOMAIN)
            )
        return _corrected(rows)

    def _difference(self, found: Estimates, tested: str) -> dict[str, Any]:
        low, high = self._limits(found, tested)
        return {
            "difference": float(found[0]),
            "difference_low": low,
            "difference_high": high,
            "p_value": p_value(found) if np.isfinite(low) else np.nan,
            **self._basis(tested),
        }

    def _limits(self, found: Estimates, tested: str) -> tuple[float, float]:
        enough = self._documents(tested) >= FEWEST_UNITS
        return limits(found) if enough else (np.nan, np.nan)

    def _trained(self, trained: str, tested: str) -> Estimates:
        if trained != ELSEWHERE:
            return self.cells[tested if trained == SAME else trained, tested]
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


def _corrected(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    corrected = holm(np.array([row["p_value"] for row in rows], dtype=float))
    return [row | {"p_corrected": float(p)} for row, p in zip(rows, corrected, strict=True)]
