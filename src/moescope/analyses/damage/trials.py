"""What is done to experts to see what it costs: ablations, swaps, substitutions."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from moescope.analyses.fits import Fits, Source, Target
from moescope.analyses.losses import Change
from moescope.errors import MoEScopeError
from moescope.interventions import mask_experts, replace_output, swap_experts
from moescope.models.alike import require_alike
from moescope.models.view import MoEModel

Kind = Literal["zero", "mask", "swap", "substitute"]
KINDS: tuple[Kind, ...] = ("zero", "mask", "swap", "substitute")
_TOGETHER = 4
"""Pairs of experts that are drawn of one pair of layers: they are compared with each other."""


class Pair(NamedTuple):
    """Two experts, and the draw that they come from."""

    one: Source
    """The expert that is replaced, where only one is."""
    other: Source
    """The expert that takes its place."""
    draw: int
    """Pairs of one draw are of the same two layers, and share no expert."""


class Trial(NamedTuple):
    """A change of the model that is to be measured."""

    kind: Kind
    """What is done."""
    one: Source
    """The expert that it is done to."""
    other: Source | None = None
    """The expert that takes its place."""
    stratum: int = 0
    """Trials of one are compared within layers: the layer, or the draw of the pair."""

    @property
    def where(self) -> str:
        """Which experts it is done to, as `named` has it."""
        return named(self.one, self.other)

    @property
    def name(self) -> str:
        """As its file is called."""
        return f"{self.kind}-{self.where}"


def named(one: Source, other: Source | None = None) -> str:
    """An expert, or two in their order."""
    return str(one) if other is None else f"{one}-{other}"


def experts_of(model: MoEModel) -> list[Source]:
    """All experts that have parameters, by layer."""
    return [
        Source(layer.index, expert)
        for layer in model.layers
        for expert in range(layer.num_experts)
        if layer.expert_tensors(expert)
    ]


def draw_pairs(model: MoEModel, experts: Sequence[Source], number: int, seed: int) -> list[Pair]:
    """Random pairs of experts that are built alike, in draws of four pairs of the same two layers.

    No expert comes twice, so that no two pairs say the same thing of it; there are at most half as
    many pairs as experts. Both experts of a draw may be of one layer.
    """
    random = np.random.default_rng([seed, 1])
    fours = []
    for layer in model.layers:
        own = [expert for expert in experts if expert.layer == layer.index]
        own = [own[i] for i in random.permutation(len(own))]
        size = min(_TOGETHER, len(own) // 2)
        fours += [own[i * size : (i + 1) * size] for i in range(len(own) // max(size, 1))]
    fours = [fours[i] for i in random.permutation(len(fours)) if fours[i]]
    found: list[Pair] = []
    draw = 0
    while fours and len(found) < number:
        first = fours.pop()
        second = next((four for four in fours if _alike(model, first[0], four[0])), None)
        if second is not None:
            fours.remove(second)
            found += [Pair(*two, draw) for two in zip(first, second, strict=False)]
            draw += 1
    return found[:number]


def _alike(model: MoEModel, one: Source, other: Source) -> bool:
    try:
        require_alike(*((model.layer(e.layer), e.expert) for e in (one, other)))
    except MoEScopeError:
        return False
    return True


def trials(experts: Sequence[Source], pairs: Sequence[Pair], model: MoEModel) -> list[Trial]:
    """Every expert ablated in two ways, every pair swapped, one of it in place of the other.

    No router is left fewer experts than it chooses.
    """
    enough = {layer.index: layer.num_experts > layer.top_k for layer in model.layers}
    found = [Trial("zero", one, stratum=one.layer) for one in experts]
    found += [Trial("mask", one, stratum=one.layer) for one in experts if enough[one.layer]]
    for kind in KINDS[2:]:
        found += [Trial(kind, one, other, draw) for one, other, draw in pairs]
    return found


def change(trial: Trial, fits: Fits) -> Change | None:
    """What makes the change; None where no adapter could be fitted."""
    model = fits.material.model
    layer, expert = model.layer(trial.one.layer), trial.one.expert
    if trial.kind == "zero":
        return lambda: replace_output((layer, expert), 0.0)
    if trial.kind == "mask":
        return lambda: mask_experts(layer, [expert])
    assert trial.other is not None
    if trial.kind == "swap":
        other = model.layer(trial.other.layer), trial.other.expert
        return lambda: swap_experts((layer, expert), other)
    target = Target(*trial.other)
    fitted = fits.between(trial.one, [target])[target]
    return None if fitted.adapter is None else lambda: fits.substituting(fitted)
