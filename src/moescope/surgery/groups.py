"""Routers that choose groups of experts first: neighbours, equally many in each group."""

from collections.abc import Sequence
from typing import Any

from moescope.errors import OptionError
from moescope.models.view import MoELayer

_NUMBER = ("n_group", "num_group")
_CHOSEN = "topk_group"
_FEWEST = 2  # a group counts by its two best experts


def groups_of(layer: MoELayer) -> int:
    """Number of groups that the router chooses among first; 1 where it looks at all experts."""
    settings = _settings(layer)
    return max(
        (found[name] for found in settings for name in _NUMBER if found.get(name)), default=1
    )


def _settings(layer: MoELayer) -> list[dict[str, Any]]:
    return [vars(module) for module in layer.block.modules()]


def require_groups(layer: MoELayer, experts: Sequence[int]) -> None:
    """Make sure that experts are groups, or equal parts of all groups, one after another.

    Raises:
        OptionError: They are not, or too few of a group are left.
    """
    groups = groups_of(layer)
    if groups <= 1:
        return
    size, left = divmod(len(experts), groups)
    former = layer.num_experts // groups
    parts = [
        {expert // former for expert in experts[start : start + size]}
        for start in range(0, size * groups, max(size, 1))
    ]
    if left or any(len(part) > 1 for part in parts) or len(set.union(*parts)) < groups:
        raise OptionError(
            f"the router of layer {layer.index} chooses among {groups} groups of experts first",
            got=list(experts),
            expected=f"equally many of each group of {former} neighbours, group after group",
        )
    chosen = max(
        (found[_CHOSEN] for found in _settings(layer) if found.get(_CHOSEN)), default=groups
    )
    fewest = max(min(_FEWEST, former), -(-layer.top_k // chosen))
    if size < fewest:
        raise OptionError(
            f"too few experts of each group of layer {layer.index}",
            got=size,
            expected=f"at least {fewest}, as its router chooses {layer.top_k} experts of "
            f"{chosen} groups",
        )
