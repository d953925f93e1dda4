"""Which neurons of a layer are more active in one domain than elsewhere, against shuffles."""

from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int
from numpy import ndarray as Array

from moescope.analyses.neurons.options import NeuronsOptions
from moescope.analyses.neurons.reading import Units
from moescope.measures.activations import (
    Activity,
    corrected,
    largest_differences,
    selectivity,
    shuffled_labels,
)
from moescope.measures.jackknife import limits

CLEAR = 0.05
"""Corrected p-values up to it are called clear."""


def shown(candidates: pd.DataFrame, number: int) -> pd.DataFrame:
    """The most selective neurons, each with the domain that it is most selective for."""
    clear = candidates["p_corrected"] <= CLEAR
    rank = candidates["difference"] * candidates["reach"]
    ranked = candidates.assign(clear=clear, rank=rank).sort_values(
        ["clear", "rank"], ascending=False, kind="stable"
    )
    ranked = ranked.drop_duplicates(["expert", "neuron"]).head(number)
    return ranked.drop(columns=["clear", "rank"])


class Tested:
    """The neurons of a layer against shuffled documents, expert by expert.

    Args:
        units: Documents.
        some: Which of them count.
        options: Options of the analysis.
        number: Of the layer, for the seed.
    """

    def __init__(
        self, units: Units, some: Bool[Array, " units"], options: NeuronsOptions, number: int
    ) -> None:
        seed = [options.seed, abs(number), int(number < 0)]
        self._some = some
        self._labels = shuffled_labels(units.domain_of[some], options.permutations, seed)
        self._left_out = units.left_out()[:, some]
        self._options = options
        self._total = np.zeros(len(self._labels))
        self._evidence = np.zeros(len(self._labels))
        self._largest_z = np.full(len(self._labels), -np.inf)
        self._without = np.zeros(len(self._left_out))
        self._columns: dict[str, list[Array]] = {}
        self.experts: list[int] = []

    def add(self, expert: int, activity: Activity, norms: Float[Array, " neurons"]) -> None:
        """Test the neurons of one expert."""
        sums, tokens = (t.cpu().numpy()[self._some] for t in (activity.sums, activity.tokens))
        found = selectivity(sums, tokens, activity.spread, self._labels)
        self._total += found.total
        self._evidence += found.evidence
        self._largest_z = np.maximum(self._largest_z, found.largest_z)
        self._without += largest_differences(
            sums, tokens, activity.spread, self._labels[0], self._left_out
        )
        self.experts.append(expert)
        means = self._means(sums, tokens)
        for name, values in (
            ("difference", found.difference),
            ("z", found.z),
            ("p_value", found.p_value),
            ("mean", means),
            ("firing", activity.firing.cpu().numpy() / float(activity.tokens.sum())),
            ("norm", norms),
        ):
            self._columns.setdefault(name, []).append(values)

    def _means(
        self, sums: Float[Array, "units neurons"], tokens: Float[Array, " units"]
    ) -> Float[Array, "neurons domains"]:
        domains = np.eye(self._labels.max() + 1)[self._labels[0]]  # [units, domains]
        number = tokens @ domains
        means = np.full((sums.shape[1], len(number)), np.nan)
        np.divide(sums.T @ domains, number, out=means, where=number > 0)
        return means

    def layer_columns(self) -> dict[str, Any]:
        """How selective the neurons are on average, against the null, and how many clearly."""
        neurons = sum(len(values) for values in self._columns["norm"])
        low, high = limits(self._without / neurons)
        best = self._corrected().min(2)
        null = self._total[1:] / neurons
        return {
            "selectivity": self._total[0] / neurons,
            "selectivity_low": float(low),
            "selectivity_high": float(high),
            "null_mean": null.mean(),
            "null_p95": np.quantile(null, 0.95),
            "p_value": (self._evidence >= self._evidence[0] - 1e-9 * abs(self._evidence[0])).mean(),
            "selective": int((best <= CLEAR).sum()),
            "selective_share": float((best <= CLEAR).mean()),
            "permutations": self._options.permutations,
        }

    def _corrected(self) -> Float[Array, "experts neurons domains"]:
        return corrected(np.stack(self._columns["z"]), self._largest_z)

    def candidates(
        self, domains: list[str], reach: Float[Array, "domains experts"]
    ) -> pd.DataFrame:
        """One row per neuron and domain: those of each domain that stand out most.

        Clear ones first, by their difference times the share of the domain's tokens that they see:
        a neuron may be made for a kind of text that hardly ever comes to its expert.
        """
        columns = {name: np.stack(values) for name, values in self._columns.items()}
        columns["p_corrected"] = self._corrected()
        number = max(self._options.group, self._options.show)
        frames = []
        for domain in range(columns["z"].shape[2]):
            seen = columns["difference"][:, :, domain] * reach[domain, self.experts][:, None]
            clear = columns["p_corrected"][:, :, domain].ravel() <= CLEAR
            best = np.lexsort((-seen.ravel(), ~clear))[:number]
            expert, neuron = np.unravel_index(best, columns["norm"].shape)
            rows = self._rows(columns, expert, neuron, domain, domains)
            frames.append(rows.assign(reach=reach[domain, rows["expert"]]))
        return pd.concat(frames, ignore_index=True)

    def _rows(
        self,
        columns: dict[str, Array],
        expert: Int[Array, " rows"],
        neuron: Int[Array, " rows"],
        domain: int,
        domains: list[str],
    ) -> pd.DataFrame:
        tested = ("difference", "z", "p_value", "p_corrected")
        means = columns["mean"][expert, neuron]
        return pd.DataFrame(
            {"expert": np.array(self.experts)[expert], "neuron": neuron, "domain": domains[domain]}
            | {name: columns[name][expert, neuron, domain] for name in tested}
            | {name: columns[name][expert, neuron] for name in ("firing", "norm")}
            | {f"mean_{name}": means[:, i] for i, name in enumerate(domains[: means.shape[1]])}
        )
