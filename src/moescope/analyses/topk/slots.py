"""Fewer experts per token, with those that are left out not computed."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

from jaxtyping import Float, Int64
from torch import Tensor

from moescope.interventions.choice import Weights, largest
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
            found.append((layer, partial(_in_fewer_slots, min(k, most), weights)))
    return found


@contextmanager
def restricted(changes: Sequence[Restriction]) -> Iterator[None]:
    """The layers are routed so for a while."""
    with ExitStack() as stack:
        for layer, change in changes:
            stack.enter_context(layer.rerouting(change))
        yield


def _in_fewer_slots(
    k: int,
    treatment: Weights,
    experts: Int64[Tensor, "tokens top_k"],
    weights: Float[Tensor, "tokens top_k"],
) -> tuple[Int64[Tensor, "tokens k"], Float[Tensor, "tokens k"]]:
    slots, kept = largest(k, treatment, weights)
    return experts.gather(1, slots), kept
