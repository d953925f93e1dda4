"""Which experts a layer keeps, and how many."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

from moescope.analyses.prune_domain.options import Criterion
from moescope.analyses.prune_domain.use import Use
from moescope.errors import OptionError
from moescope.interventions.choice import mask_experts
from moescope.measures.saliency import Saliency
from moescope.models.view import MoELayer
from moescope.surgery.groups import groups_of, require_groups

Kept = Mapping[MoELayer, Sequence[int]]
"""The experts that each layer keeps, ascending."""


def chosen(use: Mapping[MoELayer, Saliency], count: int, criterion: Criterion) -> Kept:
    """The experts that matter most to some text, `count` per layer."""
    return {
        layer: _highest(layer, seen.reap if criterion == "reap" else seen.frequency.double(), count)
        for layer, seen in use.items()
    }


def random_choice(layers: Sequence[MoELayer], count: int, seed: Sequence[int]) -> Kept:
    """Random experts, `count` per layer."""
    random = np.random.default_rng(seed)
    return {
        layer: _highest(layer, torch.from_numpy(random.random(layer.num_experts)), count)
        for layer in layers
    }


def coverage(seen: Saliency, kept: Sequence[int]) -> float:
    """Share of (token, slot) pairs that are routed to the experts that are kept."""
    return int(seen.frequency[list(kept)].sum()) / int(seen.frequency.sum())


@contextmanager
def pruned(kept: Kept) -> Iterator[None]:
    """Have routers choose among these experts alone, as after taking the others out."""
    with ExitStack() as stack:
        for layer, experts in kept.items():
            rest = sorted(set(range(layer.num_experts)) - set(experts))
            stack.enter_context(mask_experts(layer, rest))
        yield


def possible_counts(layers: Sequence[MoELayer]) -> list[int]:
    """Numbers of experts that every layer can keep, ascending, so that each leaves some out.

    At least as many as the router chooses; where it chooses groups first, equally many of each.
    """
    most = min(layer.num_experts for layer in layers)
    least = max(layer.top_k for layer in layers)
    return [count for count in range(least, most) if all(_fits(la, count) for la in layers)]


def size_of_share(
    possible: Sequence[int], uses: Sequence[Use], domains: Sequence[str], share: float
) -> int | None:
    """The fewest experts per layer that can cover a share of each domain's routing in every layer.

    Args:
        possible: Numbers of experts to choose from, ascending.
        uses: Of the parts of the text: the share is covered in each.
        domains: Whose routing.
        share: Of the (token, slot) pairs.

    Returns:
        None if that takes all experts of some layer.
    """
    for count in possible:
        least = min(
            coverage(use[domain][layer], experts)
            for use in uses
            for domain in domains
            for layer, experts in chosen(use[domain], count, "frequency").items()
        )
        if least >= share:
            return count
    return None


def _highest(layer: MoELayer, scores: Float64[Tensor, " experts"], count: int) -> list[int]:
    """The experts with the highest scores, equally many of each group; the first of equal ones."""
    by_group = scores.view(groups_of(layer), -1)
    number, size = by_group.shape
    order = by_group.argsort(dim=1, descending=True, stable=True)[:, : count // number]
    first = size * torch.arange(number)[:, None]
    return sorted((first + order).flatten().tolist())


def _fits(layer: MoELayer, count: int) -> bool:
    if count % groups_of(layer):
        return False
    try:
        require_groups(layer, _highest(layer, torch.zeros(layer.num_experts).double(), count))
    except OptionError:
        return False
    return True
