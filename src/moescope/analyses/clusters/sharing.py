"""Models in which clusters of experts share one: who leaves, and what computes its tokens."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from moescope.analyses.clusters.merging import merged_experts
from moescope.analyses.clusters.options import ClustersOptions
from moescope.analyses.clusters.tree import apart, labels_of, representatives, tree_of
from moescope.analyses.fits import Fits, Source, Target
from moescope.analyses.likeness import Likeness, expert_parameters
from moescope.analyses.losses import Change, entered
from moescope.interventions import replace_output, substitute

DEPTH, WITHIN, RANDOM = "clusters of all layers", "clusters within layers", "random clusters"
MERGED, LINEAR, MEAN = "merged within layers", "linear maps", "mean outputs"


class Setting(NamedTuple):
    """A smaller model."""

    variant: str
    """How it is made."""
    kept: int
    """Clusters of experts that it was asked for."""
    draw: int = 0
    """Number of the random choice."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Smaller:
    """What a setting comes to."""

    experts: int
    """Experts that it holds."""
    parameters: int
    """Numbers in them, and in what stands in for the others."""
    change: Change
    """Makes the model compute it."""


def sizes(experts: int, options: ClustersOptions) -> list[int]:
    """Numbers of experts kept, most first; all of them leave some out."""
    asked = options.kept or [round(share * experts) for share in options.shares]
    return sorted({min(max(1, size), experts - 1) for size in asked}, reverse=True)


def smaller_models(
    fits: Fits, likeness: Likeness, options: ClustersOptions
) -> dict[Setting, Smaller]:
    """Every variant at every size.

    In clusters of all layers, within layers and at random (of the sizes of the first), each keeps
    the expert that imitates the others best, inside the training documents, and these are computed
    by it behind their adapters. Linear maps and mean outputs take the place of the same experts as
    in the first, with no expert behind them. Merged within layers: see `merged_experts`, with as
    many experts as the parameters of the first pay for, adapters included.
    """
    layers = [expert.layer for expert in likeness.experts]
    tree = tree_of(likeness.distances)
    within = tree_of(apart(likeness.distances, layers))
    random = np.random.default_rng(options.seed)
    found = dict[Setting, Smaller]()
    for kept in sizes(len(layers), options):
        labels = labels_of(tree, kept)
        leaving = stand_ins(likeness, labels)
        found[Setting(DEPTH, kept)] = behind_adapters(fits, likeness, leaving)
        if kept >= len(set(layers)):
            own = stand_ins(likeness, labels_of(within, kept))
            found[Setting(WITHIN, kept)] = behind_adapters(fits, likeness, own)
            most = found[Setting(DEPTH, kept)].parameters
            found[Setting(MERGED, kept)] = _merged(fits, likeness.experts, most)
        for draw in range(options.random):
            others = stand_ins(likeness, random.permutation(labels))
            found[Setting(RANDOM, kept, draw)] = behind_adapters(fits, likeness, others)
        found[Setting(LINEAR, kept)] = _linear(fits, likeness.experts, list(leaving))
        found[Setting(MEAN, kept)] = _mean(fits, likeness.experts, list(leaving))
    return found


def stand_ins(likeness: Likeness, labels: Int[np.ndarray, " experts"]) -> dict[Source, Source]:
    """For every expert that its cluster does not keep, the one that it keeps."""
    kept = representatives(labels, likeness.relative)
    return {
        expert: likeness.experts[k]
        for i, (expert, k) in enumerate(zip(likeness.experts, kept.tolist(), strict=True))
        if i != k
    }


def behind_adapters(fits: Fits, likeness: Likeness, leaving: Mapping[Source, Source]) -> Smaller:
    """Have the tokens of experts computed by others behind their adapters."""
    fitted = []
    for source, stand_in in leaving.items():
        target = Target(*stand_in)
        fitted.append(fits.between(source, [target])[target])
    adapters = sum(each.adapter.num_parameters for each in fitted if each.adapter is not None)
    return Smaller(
        experts=len(likeness.experts) - len(leaving),
        parameters=adapters + _of_rest(fits, likeness.experts, leaving),
        change=lambda: entered([fits.substituting(each) for each in fitted]),
    )


def _linear(fits: Fits, experts: Sequence[Source], leaving: Sequence[Source]) -> Smaller:
    model = fits.material.model
    maps = {source: fits.linear(source) for source in leaving}
    return Smaller(
        experts=len(experts) - len(leaving),
        parameters=_of_rest(fits, experts, leaving) + sum(m.num_parameters for m in maps.values()),
        change=lambda: entered(
            [substitute((model.layer(s.layer), s.expert), None, a) for s, a in maps.items()]
        ),
    )


def _mean(fits: Fits, experts: Sequence[Source], leaving: Sequence[Source]) -> Smaller:
    model = fits.material.model
    means = {source: fits.mean(source) for source in leaving}
    return Smaller(
        experts=len(experts) - len(leaving),
        parameters=_of_rest(fits, experts, leaving) + sum(m.numel() for m in means.values()),
        change=lambda: entered(
            [replace_output((model.layer(s.layer), s.expert), m) for s, m in means.items()]
        ),
    )


def _merged(fits: Fits, experts: Sequence[Source], most: int) -> Smaller:
    model = fits.material.model
    each = expert_parameters(model, experts) / len(experts)
    kept = min(int(most / each + 1e-9), len(experts))
    merged = merged_experts(fits, experts, kept)
    return Smaller(
        experts=kept,
        parameters=round(kept * each),
        change=lambda: entered(
            [substitute((model.layer(s.layer), s.expert), w) for s, w in merged.items()]
        ),
    )


def _of_rest(fits: Fits, experts: Sequence[Source], leaving: Collection[Source]) -> int:
    rest = [expert for expert in experts if expert not in leaving]
    return expert_parameters(fits.material.model, rest)
