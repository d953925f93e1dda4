"""Experts taken out one after the other, each time the one that is expected to cost least."""

from collections.abc import Iterator, Mapping, Sequence

import torch

from moescope.analyses.fits import Fits, Source
from moescope.analyses.substitute.stand_ins import StandIn

Gone = Mapping[Source, StandIn]
"""The experts that are taken out, each with what stands in for it."""


def removals(
    choices: Mapping[Source, Sequence[StandIn]], sizes: Mapping[Source, float]
) -> Iterator[Gone]:
    """One expert more each time, until nothing is left to take out or to stand in.

    An expert that was taken out serves no other: those it served go to the next best that stays,
    and what that costs counts as the cost of taking it out. A random expert is there as long as
    the expert that it stands for.

    Args:
        choices: What may stand in for each expert, the likeliest first.
        sizes: Of each expert, what an FVU of 1 costs.
    """
    gone: dict[Source, StandIn] = {}
    while len(gone) < len(choices):
        best, least = None, float("inf")
        for source in choices:
            if source in gone:
                continue
            moved = _moved(choices, gone, source)
            cost = sum(sizes[s] * stand_in.inner_fvu for s, stand_in in moved.items())
            cost -= sum(sizes[s] * gone[s].inner_fvu for s in moved if s in gone)
            if source in moved and cost < least:
                best, least = moved, cost
        if best is None:
            return
        gone = {**gone, **best}
        yield gone


def _moved(
    choices: Mapping[Source, Sequence[StandIn]], gone: Gone, source: Source
) -> dict[Source, StandIn]:
    """Who computes the tokens of an expert once it is gone, and of those that it served.

    Nothing where somebody is left without.
    """
    without = {*gone, source}
    found = {}
    for one in [source, *(s for s, stand_in in gone.items() if _serves(source, stand_in))]:
        staying = [c for c in choices[one] if not any(_serves(other, c) for other in without)]
        if not staying:
            return {}
        found[one] = staying[0]
    return found


def _serves(expert: Source, stand_in: StandIn) -> bool:
    return stand_in.target is not None and stand_in.target[:2] == expert


def sizes_of(fits: Fits, sources: Sequence[Source]) -> dict[Source, float]:
    """Squared length that an FVU of 1 adds to the residual stream: a mean over the training text.

    Variance of the outputs of an expert, times its squared routing weights over all tokens.
    """
    return {source: _size(fits, source) for source in sources}


def _size(fits: Fits, source: Source) -> float:
    capture, layer = fits.tokens.capture, fits.material.model.layer(source.layer)
    training = ~fits.tokens.held_out[capture.documents]
    weight = 0.0
    for tokens, routing in capture.routing_shards(source.layer):
        mine = routing.experts == source.expert
        weights = mine.double() if layer.weighs_inputs else routing.weights.double() * mine
        weight += float(weights[training[tokens]].square().sum())
    outputs = fits.samples(source)[0].outputs
    variance = float((outputs - outputs.mean(0)).square().sum(1).mean())
    return variance * weight / int(torch.count_nonzero(training))


def tried_counts(number: int) -> list[int]:
    """How many experts to take out together: 1, 2, 3, 4, 6, 8, 12 and so on, and all."""
    powers = [2**i for i in range(number.bit_length())]
    counts = {*powers, *(3 * power for power in powers), number}
    return sorted(count for count in counts if count <= number)
