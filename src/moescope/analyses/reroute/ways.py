"""What becomes of a token whose expert is not resident."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from moescope.analyses.fits import Fits, Fitted, Source, Target
from moescope.analyses.likeness import Likeness
from moescope.analyses.losses import Change, entered
from moescope.analyses.reroute.options import RerouteOptions
from moescope.analyses.reroute.residents import resident_numbers, residents
from moescope.interventions import Expert, mask_experts, replace_output, substitute
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
    """Inner FVU above which tokens are skipped; NaN where that is no question."""
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
    nearest = _routes(likeness, absent, lambda source: resident)
    own = _routes(likeness, absent, lambda source: [r for r in resident if r.layer == source.layer])
    found = {
        Setting(ANY_LAYER, number, threshold): _through_adapters(
            fits, absent, _within(likeness, nearest, threshold)
        )
        for threshold in options.thresholds
    }
    found[Setting(SAME_LAYER, number)] = _through_adapters(fits, absent, own)
    random = np.random.default_rng([options.seed, number])
    for draw in range(options.random):
        drawn = {source: resident[int(random.integers(number))] for source in absent}
        found[Setting(RANDOM, number, draw=draw)] = _through_adapters(fits, absent, drawn)
    found[Setting(SKIPPED, number)] = _through_adapters(fits, absent, {})
    if all(groups_of(layer) == 1 for layer in fits.material.model.layers):
        found[Setting(ROUTER, number)] = _masked(fits, absent, used)
    found[Setting(LINEAR, number)] = _linear(fits, absent)
    found[Setting(MEAN, number)] = _mean(fits, absent)
    return found


def _routes(
    likeness: Likeness, absent: Sequence[Source], offered: Callable[[Source], Sequence[Source]]
) -> dict[Source, Source]:
    """For each the expert of those on offer with the least inner FVU in its place."""
    index = {expert: i for i, expert in enumerate(likeness.experts)}
    return {
        source: min(choice, key=lambda target: likeness.inner_fvu[index[source], index[target]])
        for source in absent
        if (choice := offered(source))
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


def _through_adapters(fits: Fits, absent: Sequence[Source], routes: Mapping[Source, Source]) -> Way:
    """Tokens of those with a route go to its end through its adapter, the others are skipped."""
    fitted = list(_fitted(fits, routes))
    skipped = [expert for expert in absent if expert not in routes]
    return Way(
        change=lambda: entered(
            [*map(fits.substituting, fitted), *(_nothing(fits, expert) for expert in skipped)]
        ),
        skipped=skipped,
        rerouted=list(routes),
        routes=routes,
        parameters=sum(each.adapter.num_parameters for each in fitted if each.adapter is not None),
    )


def _fitted(fits: Fits, routes: Mapping[Source, Source]) -> Iterator[Fitted]:
    for source, end in routes.items():
        target = Target(*end)
        yield fits.between(source, [target])[target]


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
                *(_nothing(fits, expert) for expert in skipped),
            ]
        ),
        skipped=skipped,
        rerouted=masked,
    )


def _linear(fits: Fits, absent: Sequence[Source]) -> Way:
    maps = {source: fits.linear(source) for source in absent}
    return Way(
        change=lambda: entered([substitute(_expert(fits, s), None, a) for s, a in maps.items()]),
        rerouted=absent,
        parameters=sum(adapter.num_parameters for adapter in maps.values()),
    )


def _mean(fits: Fits, absent: Sequence[Source]) -> Way:
    means = {source: fits.mean(source) for source in absent}
    return Way(
        change=lambda: entered([replace_output(_expert(fits, s), m) for s, m in means.items()]),
        rerouted=absent,
        parameters=sum(mean.numel() for mean in means.values()),
    )


def _nothing(fits: Fits, expert: Source) -> AbstractContextManager[None]:
    return replace_output(_expert(fits, expert), 0.0)


def _expert(fits: Fits, of: Source) -> Expert:
    return fits.material.model.layer(of.layer), of.expert
