"""Models in which clusters of experts share one: who leaves, and what computes its tokens."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from moescope.analyses.clusters.merging import affordable, merged_experts
from moescope.analyses.clusters.options import ClustersOptions
from moescope.analyses.clusters.tree import apart, labels_of, representatives, tree_of
from moescope.analyses.fits import Fits, Source
from moescope.analyses.instead import (
    Instead,
    expert_of,
    linear_maps,
    mean_outputs,
    through_adapters,
)
from moescope.analyses.likeness import Likeness, expert_parameters
from moescope.analyses.losses import Change, entered
from moescope.interventions import substitute

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
    found = dict[Setting, Smaller]()
    for kept in sizes(len(layers), options):
        labels = labels_of(tree, kept)
        leaving = stand_ins(likeness, labels)
        own = _smaller(fits, likeness, leaving, through_adapters(fits, leaving))
        found[Setting(DEPTH, kept)] = own
        if kept >= len(set(layers)):
            others = stand_ins(likeness, labels_of(within, kept))
            instead = through_adapters(fits, others)
            found[Setting(WITHIN, kept)] = _smaller(fits, likeness, others, instead)
        if merged := _merged(fits, likeness, own.parameters):
            found[Setting(MERGED, kept)] = merged
        random = np.random.default_rng([options.seed, kept])
        for draw in range(options.random):
            others = stand_ins(likeness, random.permutation(labels))
            instead = through_adapters(fits, others)
            found[Setting(RANDOM, kept, draw)] = _smaller(fits, likeness, others, instead)
        for variant, by in ((LINEAR, linear_maps), (MEAN, mean_outputs)):
            instead = by(fits, list(leaving))
            found[Setting(variant, kept)] = _smaller(fits, likeness, leaving, instead)
    return found


def stand_ins(likeness: Likeness, labels: Int[np.ndarray, " experts"]) -> dict[Source, Source]:
    """For every expert that its cluster does not keep, the one that it keeps."""
    kept = representatives(labels, likeness.relative)
    return {
        source: likeness.experts[k]
        for i, (source, k) in enumerate(zip(likeness.experts, kept.tolist(), strict=True))
        if i != k
    }


def _smaller(
    fits: Fits, likeness: Likeness, leaving: Collection[Source], instead: Instead
) -> Smaller:
    stay = [expert for expert in likeness.experts if expert not in leaving]
    return Smaller(
        experts=len(stay),
        parameters=expert_parameters(fits.material.model, stay) + instead.parameters,
        change=instead.change,
    )


def _merged(fits: Fits, likeness: Likeness, most: int) -> Smaller | None:
    """None where parameters do not pay for an expert of every layer."""
    model, experts = fits.material.model, likeness.experts
    kept = affordable(model, experts, most)
    if not kept:
        return None
    width = {e.layer: expert_parameters(model, [e]) for e in experts}
    return Smaller(
        experts=sum(kept.values()),
        parameters=sum(width[layer] * number for layer, number in kept.items()),
        change=lambda: entered(
            [
                substitute(expert_of(fits, source), weights)
                for source, weights in merged_experts(fits, experts, kept).items()
            ]
        ),
    )
