"""The swaps of blocks: every pair of sparse layers of a stack."""

from collections.abc import Sequence
from functools import partial
from itertools import combinations

from moescope.analyses.swap_blocks.options import SwapBlocksOptions
from moescope.analyses.swap_blocks.passes import Swap
from moescope.captures.places import Place
from moescope.errors import unknown
from moescope.interventions.blocks import swap_blocks
from moescope.interventions.choice import set_top_k
from moescope.models.view import MoELayer


def block_swaps(layers: Sequence[MoELayer], experts_only: bool) -> list[Swap]:
    """One per pair, in the order of the study: the first layer with all others, then the second."""
    return [_swap(a, b, experts_only) for a, b in combinations(layers, 2)]


def _swap(a: MoELayer, b: MoELayer, experts_only: bool) -> Swap:
    name = f"{a.index}-{b.index}"
    one, other = Place.of(a), Place.of(b)
    return Swap(
        name=name,
        file=f"{a.stack}-{name}" + ("-experts" if experts_only else ""),
        columns={
            "swap": name,
            "stack": a.stack,
            "layer": a.index,
            "other_layer": b.index,
            "distance": b.index - a.index,
        },
        places=(one, other),
        change=partial(swap_blocks, a, b, experts_only=experts_only),
        home={} if experts_only else {one: other, other: one},
    )


def left_out(layers: Sequence[MoELayer]) -> list[Swap]:
    """No swaps, but each layer in turn without its routed experts."""
    return [
        Swap(
            name=f"without {layer.index}",
            file=f"{layer.stack}-without-{layer.index}",
            columns={"swap": "none", "stack": layer.stack, "layer": layer.index},
            places=(Place.of(layer), Place.of(layer)),
            change=partial(set_top_k, layer, 0),
        )
        for layer in layers
    ]


def shown_swaps(
    layers: Sequence[MoELayer], swaps: Sequence[Swap], asked: SwapBlocksOptions
) -> list[str]:
    """Names of the swaps whose routing is drawn (as in Figure 2 of MoE Align).

    Raises:
        OptionError: There is no such swap.
    """
    known = [swap.name for swap in swaps]
    for name in asked.shown:
        if name not in known:
            raise unknown("swap", name, known)
    numbers = [layer.index for layer in layers]
    others = dict.fromkeys((numbers[1], numbers[len(numbers) // 2], numbers[-1]))
    return list(asked.shown) or [f"{numbers[0]}-{other}" for other in others]
