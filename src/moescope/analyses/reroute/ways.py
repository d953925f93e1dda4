"""What becomes of a token whose expert is not resident."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from moescope.analyses.fits import Fits, Source
from moescope.analyses.instead import linear_maps, mean_outputs, nothing, through_adapters
from moescope.analyses.likeness import Likeness
from moescope.analyses.losses import Change, entered
from moescope.analyses.reroute.options import RerouteOptions
from moescope.analyses.reroute.residents import resident_numbers, residents
from moescope.interventions import mask_experts
from moescope.surgery.groups import groups_of

ANY_LAYER, SAME_LAYER, RANDOM = "any layer", "same layer", "random resident"
ROUTER, SKIPPED = "router's next choice", "skipped"
LINEAR, MEAN = "linear map", "mean output"


class Setting(NamedTuple):
    """A budget, and a way to go on without the other experts."""

    way: str
    """What becomes of their tokens."""
    resident: int
    """Number of resident experts."""
    threshold: float = float("nan")
    """Inner FVU of the route above which tokens are skipped; NaN where there are no routes."""
    draw: int = 0
    """Number of the random choice."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Way:
    """What a setting comes to."""

    change: Change
    """Makes the model do so."""
    skipped: Sequence[Source] = ()
    """Experts whose tokens get nothing in their place."""
    rerouted: Sequence[Source] = ()
    """Experts whose tokens go elsewhere."""
    routes: Mapping[Source, Source] = field(default_factory=dict)
    """To which expert, where that is one for all of them."""
    parameters: int = 0
    """Numbers in adapters, maps and means."""


def ways(
    fits: Fits, likeness: Likeness, tokens: Mapping[Source, int], options: RerouteOptions
) -> dict[Setting, Way]:
    """Every way at every budget.

    Args:
        fits: The adapters.
        likeness: What the most similar expert is chosen by.
        tokens: How many tokens of the training documents used each expert.
        options: Budgets, thresholds, random choices.
    """
    used = {expert: tokens[expert] for expert in likeness.experts}
    found = dict[Setting, Way]()
    for number in resident_numbers(len(used), options.budgets):
        found |= _at_budget(fits, likeness, used, residents(used, number), options)
    return found


def _at_budget(
    fits: Fits,
    likeness: Likeness,
    used: Mapping[Source, int],
    resident: Sequence[Source],
    options: RerouteOptions,
) -> dict[Setting, Way]:
    absent, number = [expert for expert in used if expert not in resident], len(resident)
    random = np.random.default_rng([options.seed, number])
    near = {r: [other for other in resident if other.layer == r.layer] for r in absent}
    routes = {
        (ANY_LAYER, 0): _nearest(likeness, dict.fromkeys(absent, resident)),
        (SAME_LAYER, 0): _nearest(likeness, near),
    }
    for draw in range(options.random):
        ends = random.integers(number, size=len(absent)).tolist()
        routes[RANDOM, draw] = {e: resident[end] for e, end in zip(absent, ends, strict=True)}
    found = dict[Setting, Way]()
    for (way, draw), every in routes.items():
        # The others go by the threshold that they are compared at.
        for threshold in options.thresholds if way == ANY_LAYER else options.thresholds[:1]:
            kept = _within(likeness, every, threshold)
            found[Setting(way, number, threshold, draw)] = _rerouted(fits, absent, kept)
    found[Setting(SKIPPED, number)] = _rerouted(fits, absent, {})
    if all(groups_of(layer) == 1 for layer in fits.material.model.layers):
        found[Setting(ROUTER, number)] = _masked(fits, absent, used)
    for way, by in ((LINEAR, linear_maps), (MEAN, mean_outputs)):
        instead = by(fits, absent)
        found[Setting(way, number)] = Way(
            change=instead.change, rerouted=absent, parameters=instead.parameters
        )
    return found


def _nearest(
    likeness: Likeness, offered: Mapping[Source, Sequence[Source]]
) -> dict[Source, Source]:
    """For each the expert of those on offer with the least inner FVU in its place."""
    index = {expert: i for i, expert in enumerate(likeness.experts)}
    return {
        source: min(choice, key=lambda target: likeness.inner_fvu[index[source], index[target]])
        for source, choice in offered.items()
        if choice
    }


def _within(
    likeness: Likeness, routes: Mapping[Source, Source], threshold: float
) -> dict[Source, Source]:
    index = {expert: i for i, expert in enumerate(likeness.experts)}
    return {
        source: target
        for source, target in routes.items()
        if likeness.inner_fvu[index[source], index[target]] <= threshold
    }


def _rerouted(fits: Fits, absent: Sequence[Source], routes: Mapping[Source, Source]) -> Way:
    """Tokens of those with a route go to its end through its adapter, the others are skipped."""
    skipped = [expert for expert in absent if expert not in routes]
    behind, mute = through_adapters(fits, routes), nothing(fits, skipped)
    return Way(
        change=lambda: entered([*behind.changes(), *mute.changes()]),
        skipped=skipped,
        rerouted=list(routes),
        routes=routes,
        parameters=behind.parameters,
    )


def _masked(fits: Fits, absent: Sequence[Source], used: Mapping[Source, int]) -> Way:
    """The router chooses among the resident experts, as far as these are enough for it.

    Where they are not, the most used of the others stay in the choice, and add nothing.
    """
    model, masked, skipped = fits.material.model, list[Source](), list[Source]()
    for layer in model.layers:
        own = [expert for expert in absent if expert.layer == layer.index]
        own.sort(key=lambda expert: (used[expert], expert))
        most = layer.num_experts - layer.top_k
        masked += own[:most]
        skipped += own[most:]
    numbers = {la: [e.expert for e in masked if e.layer == la.index] for la in model.layers}
    return Way(
        change=lambda: entered(
            [
                *(mask_experts(layer, experts) for layer, experts in numbers.items()),
                *nothing(fits, skipped).changes(),
            ]
        ),
        skipped=skipped,
        rerouted=masked,
    )
