"""Fewer experts per token, with those that are left out not computed."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from moescope.interventions.choice import Weights
from moescope.models.view import MoELayer, Rerouting

Restriction = tuple[MoELayer, Rerouting]
"""A layer, and what becomes of its routing."""


def restrictions(layers: Sequence[MoELayer], k: int, weights: Weights) -> list[Restriction]:
    """What `set_top_k` does, in as few slots per token as experts stay.

    Args:
        layers: The layers; those that use fewer experts than k keep theirs.
        k: Experts per token.
        weights: What becomes of their weights.
    """
    found: list[Restriction] = []
    for layer in layers:
        most = layer.top_k
        if k < most or weights == "to_one":
            found.append((layer, partial(_largest, min(k, most), weights)))
    return found


@contextmanager
def restricted(changes: Sequence[Restriction]) -> Iterator[None]:
    """The layers are routed so for a while."""
    with ExitStack() as stack:
        for layer, change in changes:
            stack.enter_context(layer.rerouting(change))
        yield


def _largest(
    k: int,
    treatment: Weights,
    experts: Int64[Tensor, "tokens top_k"],
    weights: Float[Tensor, "tokens top_k"],
) -> tuple[Int64[Tensor, "tokens k"], Float[Tensor, "tokens k"]]:
    chosen = weights.topk(k, dim=1).indices
    kept = weights.gather(1, chosen)
    if treatment != "as_is":
        mass = kept.sum(1, keepdim=True)
        wanted = weights.sum(1, keepdim=True) if treatment == "same_mass" else torch.ones_like(mass)
        # Where nothing is left, nothing is rescaled.
        kept = kept * torch.where(mass > 0, wanted / mass, 0)
    return experts.gather(1, chosen), kept
