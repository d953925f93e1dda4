"""Interventions on what the router chooses, and on how much of it counts."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from moescope.errors import OptionError, unknown
from moescope.models.view import MoELayer

Weights = Literal["as_is", "same_mass", "to_one"]
"""What becomes of the weights of the experts that stay: what they were, rescaled to the sum over
all the router chose, rescaled to the sum of one."""


@contextmanager
def mask_experts(layer: MoELayer, experts: Sequence[int]) -> Iterator[None]:
    """Have the router choose as if `experts` did not exist: as after pruning them.

    A softmax over all experts is taken over those that are left, so that in families that do not
    renormalise the weights of the chosen ones grow by the share of the masked ones.

    Raises:
        OptionError: There is no such expert, or fewer than top_k would be left.
        ModelError: In the forward pass: groups, or several masks, left the router too few.
    """
    if not experts:
        yield
        return
    with layer.masking(experts):
        yield


@contextmanager
def set_top_k(
    layers: MoELayer | Sequence[MoELayer], k: int, weights: Weights = "as_is"
) -> Iterator[None]:
    """Keep, for every token, only the k largest weights of those the router gave.

    For softmax routers these are its k best experts, as in MoE Lens; where a
    bias or groups choose, they are the k of its choice that weigh most. The others are seen with
    weight 0. k = 0 leaves the shared expert alone, whatever `weights`.

    Args:
        layers: One layer or several.
        k: Experts per token, 0 to top_k of every layer.
        weights: What becomes of the weights that are kept.

    Raises:
        OptionError: k does not fit a layer, or `weights` is none of the three.
    """
    if weights not in get_args(Weights):
        raise unknown("treatment of weights", weights, get_args(Weights))
    chosen = [layers] if isinstance(layers, MoELayer) else layers
    for layer in chosen:
        if not 0 <= k <= layer.top_k:
            raise OptionError(
                f"{layer.stack} layer {layer.index} cannot use that many experts per token",
                got=k,
                expected=f"0 to {layer.top_k}",
            )
    with ExitStack() as stack:
        for layer in chosen:
            if k < layer.top_k or weights == "to_one":
                stack.enter_context(layer.rerouting(partial(_keep_largest, k, weights)))
        yield


def largest(
    k: int, treatment: Weights, weights: Float[Tensor, "tokens top_k"]
) -> tuple[Int64[Tensor, "tokens k"], Float[Tensor, "tokens k"]]:
    """Slots of the k largest weights of each token, and what becomes of these."""
    slots = weights.topk(k, dim=1).indices
    kept = weights.gather(1, slots)
    if treatment == "as_is":
        return slots, kept
    mass = kept.sum(1, keepdim=True)
    wanted = weights.sum(1, keepdim=True) if treatment == "same_mass" else torch.ones_like(mass)
    # Where nothing is left, nothing is rescaled.
    return slots, kept * torch.where(mass > 0, wanted / mass, 0)


def _keep_largest(
    k: int,
    treatment: Weights,
    experts: Int64[Tensor, "tokens top_k"],
    weights: Float[Tensor, "tokens top_k"],
) -> tuple[Int64[Tensor, "tokens top_k"], Float[Tensor, "tokens top_k"]]:
    slots, kept = largest(k, treatment, weights)
    return experts, torch.zeros_like(weights).scatter(1, slots, kept)
