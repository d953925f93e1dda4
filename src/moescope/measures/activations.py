"""How active neurons are, how much more in one kind of text, and whether their numbers mean much.

A neuron is active at a token where the absolute value of its activation is above a threshold.
"""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Int64
from numpy import ndarray as Array
from torch import Tensor

from moescope.measures.similarity import Matrices, inner_products

FEWEST_TOKENS = 300
"""Tokens below which a neuron that was never active is not called dead. One that is active at 1%
of all tokens is silent on so many independent ones with probability 0.05."""

FEWEST_SELECTIVE = 8
"""Units with tokens that a domain needs, and that others need, for its neurons to be tested: the
standard error of a mean of fewer says too little."""

_ROUNDING = 1e-14
_LOWEST, _HIGHEST, _PER_DECADE = -6, 4, 100
_CELLS_AT_ONCE = 2**22


class Activity:
    """Sums over the tokens of one expert, batch by batch; of tokens nothing is kept.

    Args:
        units: Documents, or groups of documents, that are kept apart.
        neurons: Neurons of the expert.
        threshold: Above which an absolute activation counts as active.
        device: Where batches come from.
    """

    def __init__(
        self, units: int, neurons: int, threshold: float, device: torch.device | str = "cpu"
    ) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.float64, device=device)

        self._threshold = threshold
        self.tokens = zeros(units)
        """[units] tokens."""
        self.active = zeros(units)
        """[units] active neurons, summed over tokens."""
        self.emitting = zeros(units)
        """[units] the same of what neurons emit: activation times up, where there is a gate."""
        self.sums = zeros(units, neurons)
        """[units, neurons] sums of absolute activations."""
        self.squares = zeros(neurons)
        """[neurons] sums of squared activations."""
        self.firing = zeros(neurons)
        """[neurons] tokens at which each is active."""
        self.emitted = zeros(neurons)
        """[neurons] sums of the absolute values that it emits."""
        self.histogram = zeros((_HIGHEST - _LOWEST) * _PER_DECADE)
        """[bins] absolute activations, by their logarithm; the outermost hold all beyond."""

    def add(
        self,
        units: Int64[Tensor, " tokens"],
        activations: Float[Tensor, "tokens neurons"],
        emitted: Float[Tensor, "tokens neurons"],
    ) -> None:
        """Add a batch of tokens: what each belongs to, activations, and what neurons emit."""
        size = activations.abs()
        above = size > self._threshold
        self.tokens += units.bincount(minlength=len(self.tokens))
        self.active.index_add_(0, units, above.sum(1).double())
        self.emitting.index_add_(0, units, (emitted.abs() > self._threshold).sum(1).double())
        self.sums.index_add_(0, units, size.double())
        self.squares += size.double().square().sum(0)
        self.firing += above.sum(0)
        self.emitted += emitted.abs().sum(0, dtype=torch.float64)
        logs = size.flatten().log10().clamp(_LOWEST, _HIGHEST)
        bins = ((logs - _LOWEST) * _PER_DECADE).long().clamp_max(len(self.histogram) - 1)
        self.histogram += bins.bincount(minlength=len(self.histogram))

    @property
    def spread(self) -> Float[Array, " neurons"]:
        """Standard deviation of each neuron's absolute activation over tokens; NaN without any."""
        tokens = self.tokens.sum()
        mean = self.sums.sum(0) / tokens
        return np.asarray((self.squares / tokens - mean.square()).clamp_min(0).sqrt().cpu())


def quantiles(histogram: Float[Tensor, " bins"], levels: list[float]) -> list[float]:
    """Quantiles of absolute activations, to 1.2% of their value; 0 below 1e-6, NaN without any."""
    total = histogram.cpu().cumsum(0)
    if not total[-1]:
        return [float("nan")] * len(levels)
    reached = torch.searchsorted(total, torch.tensor(levels, dtype=total.dtype) * total[-1])
    middles = 10 ** (_LOWEST + (reached + 0.5) / _PER_DECADE)
    return torch.where(reached > 0, middles, 0).tolist()


class Selectivity(NamedTuple):
    """How much more active neurons are in each domain than elsewhere, and under shuffled labels.

    The first draw is what was observed.
    """

    difference: Float[Array, "neurons domains"]
    """Mean absolute activation in the domain minus that elsewhere, in standard deviations over
    all tokens; 0 where a side has no tokens, or the neuron no spread."""
    z: Float[Array, "neurons domains"]
    """The same over its own standard error, above the mean of that over draws, in standard
    deviations over draws; 0 where a side has fewer than `FEWEST_SELECTIVE` units."""
    p_value: Float[Array, "neurons domains"]
    """Share of the draws in which it is as large."""
    largest_z: Float[Array, " draws"]
    """The largest z of all neurons and domains in every draw: what corrects for their number."""
    total: Float[Array, " draws"]
    """Sum over neurons of their largest difference of all domains that are tested; of shuffles,
    what it would be with the standard errors of the labels as observed."""
    evidence: Float[Array, " draws"]
    """Sum over neurons of their largest z: what a test of all of them together rests on."""


def shuffled_labels(
    domain_of: Int[Array, " units"], permutations: int, seed: int | list[int]
) -> Int[Array, "draws units"]:
    """Domains of the units, and then so many times with the units shuffled."""
    labels = np.tile(domain_of, (1 + permutations, 1))
    random = np.random.default_rng(seed)
    random.permuted(labels[1:], axis=1, out=labels[1:])
    return labels


def selectivity(
    sums: Float[Array, "units neurons"],
    tokens: Float[Array, " units"],
    spread: Float[Array, " neurons"],
    labels: Int[Array, "draws units"],
) -> Selectivity:
    """Test every neuron of an expert for every domain, by shuffling whole documents.

    One-sided; no p is below one over the number of draws. What is compared is the difference over
    its standard error, each draw with its own: documents of one domain may be shorter, or fewer of
    their tokens come to the expert, so that the domain's mean is noisier than that of as many
    shuffled documents (Janssen 1997; Chung and Romano 2013). For a correction over all neurons and
    domains (single-step maxT, Westfall and Young 1993) see `corrected`.

    Args:
        sums: Sums of absolute activations of each unit.
        tokens: Tokens of each unit.
        spread: Standard deviation of the absolute activation of each neuron, over tokens.
        labels: Domain of every unit, as observed and shuffled.
    """
    draws, neurons = len(labels), sums.shape[1]
    inside = [(labels == domain).astype(float) for domain in range(int(labels.max()) + 1)]
    enough = np.array([_is_tested(side[0], tokens) for side in inside])
    everything = np.ones((1, len(tokens)))
    parts = []
    largest_z = np.full(draws, -np.inf)
    total, evidence = np.zeros(draws), np.zeros(draws)
    size = max(1, _CELLS_AT_ONCE // (draws * len(inside)))
    for start in range(0, neurons, size):
        some = slice(start, start + size)
        found = [_contrast(side, everything, sums[:, some], tokens) for side in inside]
        scale = np.where(spread[some] > 0, spread[some], np.inf)[:, None]
        difference = np.stack([c.difference[0] for c in found], axis=-1) / scale
        every = np.stack([c.studentised for c in found], axis=-1)  # [draws, neurons, domains]
        every[:, ~(enough & np.isfinite(scale))] = 0
        errors = np.divide(difference, every[0], out=np.zeros_like(difference), where=every[0] != 0)
        units = _standardised(every)
        p_values = (units >= _but_for_rounding(units[0])).mean(0)
        parts.append((difference, units[0], p_values))
        largest_z = np.maximum(largest_z, units.max((1, 2)))
        total += (every * errors).max(2).sum(1)
        evidence += units.max(2).sum(1)
    difference, z, p_value = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    return Selectivity(difference, z, p_value, largest_z, total, evidence)


def corrected(
    z: Float[Array, "*hypotheses"], largest_z: Float[Array, " draws"]
) -> Float[Array, "*hypotheses"]:
    """p-values of the `z` of many neurons, given the largest of all of them in every draw."""
    ordered = np.sort(largest_z)
    below = np.searchsorted(ordered, _but_for_rounding(z))
    return np.asarray((len(ordered) - below) / len(ordered))


def largest_differences(
    sums: Float[Array, "units neurons"],
    tokens: Float[Array, " units"],
    spread: Float[Array, " neurons"],
    domain_of: Int[Array, " units"],
    kept: Float[Array, "estimates units"],
) -> Float[Array, " estimates"]:
    """Sum over neurons of their largest difference, with the units of each row of `kept` alone."""
    scale = np.where(spread > 0, spread, np.inf)
    found = [
        _contrast(kept * inside, kept, sums, tokens).difference / scale
        for inside in (domain_of == domain for domain in range(int(domain_of.max()) + 1))
        if _is_tested(inside, tokens)
    ]
    return np.asarray(np.max(found, axis=0).sum(1)) if found else np.zeros(len(kept))


def _but_for_rounding(values: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    return np.asarray(values - 1e-9 * np.abs(values) - 1e-12)


class Contrast(NamedTuple):
    """Mean per token of some units minus that of the others."""

    difference: Float[Array, "draws neurons"]
    """0 where a side has no tokens."""
    studentised: Float[Array, "draws neurons"]
    """The difference over its standard error; 0 where a side has fewer than two units."""


@np.errstate(divide="ignore", invalid="ignore")  # a side without tokens
def _contrast(
    inside: Float[Array, "draws units"],
    everything: Float[Array, "#draws units"],
    sums: Float[Array, "units neurons"],
    tokens: Float[Array, " units"],
) -> Contrast:
    """The units of each row of `inside` against the others of `everything`.

    Standard errors are those of a ratio of sums over units, linearised.
    """
    facts = np.stack([tokens, tokens**2, tokens > 0], axis=1)
    values = np.stack([sums, sums * tokens[:, None], sums**2])
    own = (inside @ facts).T[..., None], inside @ values
    rest = (everything @ facts).T[..., None] - own[0], everything @ values - own[1]
    means, variances = [], []
    for (number, squared, units), (total, crossed, squares) in (own, rest):
        mean = total / number
        residuals = squares - 2 * mean * crossed + mean**2 * squared
        rounding = _ROUNDING * squares  # of the subtraction
        means.append(mean)
        variances.append(np.maximum(residuals, rounding) / number**2 * units / (units - 1))
    difference = np.nan_to_num(means[0] - means[1])
    studentised = difference / np.sqrt(variances[0] + variances[1])
    return Contrast(difference, np.where(np.isfinite(studentised), studentised, 0))


def _is_tested(
    inside: Bool[Array, " units"] | Float[Array, " units"], tokens: Float[Array, " units"]
) -> bool:
    """Whether both sides have units enough."""
    present = tokens > 0
    own = int((present & (inside > 0)).sum())
    return min(own, int(present.sum()) - own) >= FEWEST_SELECTIVE


def _standardised(every: Float[Array, "draws *hypotheses"]) -> Float[Array, "draws *hypotheses"]:
    """In standard deviations over draws; 0 where no draw changes anything but by rounding."""
    spread = every.std(0)
    flat = spread <= 1e-6
    return np.asarray(np.where(flat, 0.0, (every - every.mean(0)) / np.where(flat, 1, spread)))


class SameIndex(NamedTuple):
    """How alike the neurons of two experts are, by pair of experts."""

    same: Float[Array, "experts experts"]
    """Mean cosine of neurons of the same number."""
    other: Float[Array, "experts experts"]
    """Mean cosine of neurons of different numbers."""
    paired: Float[Array, " draws"]
    """Mean of `same` over pairs of experts, each with its neurons renumbered at random."""


def same_index(experts: Matrices, *, draws: int, seed: int | list[int]) -> SameIndex:
    """Whether neurons of the same number belong together, beyond any two.

    Args:
        experts: A matrix for each, [neurons, features]: weights of neurons, or activations at the
            same tokens, from which each neuron's mean was taken for a correlation.
        draws: Random numberings.
        seed: Of these.
    """
    rows = [matrix / matrix.norm(dim=1, keepdim=True).clamp_min(1e-30) for matrix in experts]
    neurons = len(rows[0])
    above = np.triu_indices(len(rows), 1)
    same = _mean_products(rows)
    totals = np.asarray(torch.stack([matrix.sum(0, dtype=torch.float64) for matrix in rows]).cpu())
    other = (totals @ totals.T - neurons * same) / (neurons * max(neurons - 1, 1))
    random = np.random.default_rng(seed)
    paired = np.empty(draws)
    for draw in range(draws):
        orders = torch.from_numpy(
            random.permuted(np.tile(np.arange(neurons), (len(rows), 1)), axis=1)
        )
        turned = [matrix[order] for matrix, order in zip(rows, orders, strict=True)]
        paired[draw] = _mean_products(turned)[above].mean()
    return SameIndex(same, other, paired)


def _mean_products(rows: Matrices) -> Float[Array, "experts experts"]:
    return np.asarray(inner_products(rows, rows)) / len(rows[0])
