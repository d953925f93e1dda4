"""Go on from adapters that a smaller fit has found."""

from collections.abc import Sequence

import torch
from torch import Tensor

from moescope.alignment.domains import Domain
from moescope.alignment.stack import AdapterStack
from moescope.alignment.starts import no_delta, units_of
from moescope.alignment.whitening import Whitening
from moescope.experts.adapter import Adapter, Form

_STEP = 0.1  # unit of gain and shift, times the spread of the target's inputs
_MATRIX_STEP = 0.3  # of the usual one: the usual one undoes most of what has been found


def resumed(
    form: Form,
    rank: int,
    adapters: Sequence[Adapter],
    whitening: Whitening,
    domains: Sequence[Domain],
) -> tuple[AdapterStack, dict[str, Tensor]]:
    """Given adapters as the start of others that can do at least as much; units as in `start`.

    Args:
        form: The adapters' own, or "layer_norm" where they are of low rank.
        rank: At least their own, where the form is "low_rank".
        adapters: On plain inputs, one for each fit.
        whitening: The coordinates of the form.
        domains: Where the inputs of each target lie.
    """
    back = Whitening(-whitening.mean @ whitening.matrix, whitening.inverse, whitening.matrix)
    each = [_grown(form, rank, adapter, back).tensors() for adapter in adapters]
    joined = {name: torch.cat([tensors[name] for tensors in each]) for name in each[0]}
    adapted = AdapterStack.holding(form, joined)
    unit = _STEP * torch.stack([domain.spread for domain in domains])
    if form not in ("low_rank", "scale"):
        unit = unit.square().mean(1, keepdim=True).sqrt()
    units = units_of(adapted, unit)
    for name, tensor in adapted.tensors().items():
        if tensor.ndim == 3:
            units[name] = _MATRIX_STEP * units[name]
    return adapted, units


def _grown(form: Form, rank: int, adapter: Adapter, back: Whitening) -> AdapterStack:
    """One adapter in other coordinates, with room for the rank or the full matrix."""
    parts = {name: tensor[None] for name, tensor in adapter.tensors().items()}
    if form != adapter.form:
        assert (adapter.form, form) == ("low_rank", "layer_norm")
        delta = torch.bmm(parts["left"], parts["right"])
        parts["weight"] = torch.diag_embed(parts["diagonal"]) + delta
    grown = AdapterStack.holding(form, parts).folded(back)
    if form != "low_rank":
        return grown
    parts = grown.tensors()
    left, right = no_delta(grown.shift, rank - adapter.rank)
    parts["left"] = torch.cat([parts["left"], left], 2)
    parts["right"] = torch.cat([parts["right"], right], 1)
    return AdapterStack.holding(form, parts)
