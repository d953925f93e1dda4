"""The swaps of single experts: chosen pairs, the most used experts, or all pairs of two layers."""

import re
from collections.abc import Sequence
from functools import partial
from itertools import combinations, product

from moescope.analyses.swap_blocks.kept import Measured
from moescope.analyses.swap_blocks.passes import Swap
from moescope.analyses.swap_experts.options import SwapExpertsOptions
from moescope.captures.places import Place
from moescope.errors import OptionError
from moescope.interventions.functions import Expert
from moescope.interventions.tensors import swap_experts
from moescope.models.view import MoELayer

_PAIR = re.compile(r"(\d+)\.(\d+)-(\d+)\.(\d+)")


def expert_swaps(
    layers: Sequence[MoELayer], options: SwapExpertsOptions, baseline: Measured
) -> list[Swap]:
    """The swaps that are asked for.

    Args:
        layers: The sparse layers of a stack.
        options: Pairs or layers; else the most used expert of each layer is taken.
        baseline: How often experts are used by the model as it is.

    Raises:
        OptionError: A pair cannot be read, or names a layer or an expert that does not exist.
    """
    by_number = {layer.index: layer for layer in layers}
    if options.pairs:
        asked = [_pair(text, by_number) for text in options.pairs]
        # Either way round it is the same swap: the first stays.
        pairs = [p for i, p in enumerate(asked) if p not in asked[:i] and p[::-1] not in asked[:i]]
    elif options.layers:
        one, other = (_layer(number, by_number) for number in options.layers)
        numbers = product(range(one.num_experts), range(other.num_experts))
        pairs = [((one, e), (other, f)) for e, f in numbers]
    else:
        most_used = [(layer, _most_used(layer, baseline)) for layer in layers]
        pairs = list(combinations(most_used, 2))
    return [_swap(a, b, baseline) for a, b in pairs]


def _pair(text: str, layers: dict[int, MoELayer]) -> tuple[Expert, Expert]:
    found = _PAIR.fullmatch(text)
    if found is None:
        raise OptionError(
            "cannot read a pair of experts", got=text, expected="layer.expert-layer.expert: 0.3-5.1"
        )
    a, e, b, f = map(int, found.groups())
    one, other = _layer(a, layers), _layer(b, layers)
    one.check_experts([e])
    other.check_experts([f])
    if (a, e) == (b, f):
        raise OptionError("an expert cannot change places with itself", got=text)
    return (one, e), (other, f)


def _layer(number: int, layers: dict[int, MoELayer]) -> MoELayer:
    if number not in layers:
        raise OptionError(
            "there is no such sparse layer", got=number, expected=", ".join(map(str, layers))
        )
    return layers[number]


def _most_used(layer: MoELayer, baseline: Measured) -> int:
    return int(baseline.counts[Place.of(layer)].sum(0).argmax())


def _share(expert: Expert, baseline: Measured) -> float:
    counts = baseline.counts[Place.of(expert[0])].sum(0)
    return float(counts[expert[1]] / max(1, counts.sum()))


def _swap(a: Expert, b: Expert, baseline: Measured) -> Swap:
    (one, e), (other, f) = a, b
    name = f"{one.index}.{e}-{other.index}.{f}"
    return Swap(
        name=name,
        file=f"{one.stack}-{name}",
        columns={
            "swap": name,
            "stack": one.stack,
            "layer": one.index,
            "expert": e,
            "other_layer": other.index,
            "other_expert": f,
            "distance": abs(other.index - one.index),
            "share": _share(a, baseline),
            "other_share": _share(b, baseline),
        },
        places=(Place.of(one), Place.of(other)),
        change=partial(swap_experts, a, b),
    )
