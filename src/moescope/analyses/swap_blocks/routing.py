"""How often each expert of every layer is used with swaps, against the model as it is."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from numpy import ndarray as Array

from moescope.analyses.swap_blocks.kept import Measured
from moescope.analyses.swap_blocks.passes import Swap, Swaps
from moescope.captures.places import Place
from moescope.evaluate.paired import BASELINE
from moescope.measures.jackknife import limits, whole_and_left_out
from moescope.measures.routing import jensen_shannon_bits

_SPLITS = 20


def shares_table(swaps: Swaps, shown: Sequence[str]) -> pd.DataFrame:
    """Part of the routing of every layer that goes to each expert, for the baseline and each swap.

    Args:
        swaps: The measurements.
        shown: Names of the swaps that are drawn.

    Returns:
        swap, shown, stack, layer, router_of (the layer whose router stands there meanwhile),
        expert, count (of routed (token, slot) pairs), share.
    """
    named: list[tuple[str, Swap | None, Measured]] = [(BASELINE, None, swaps.baseline)]
    named += [(swap.name, swap, measured) for swap, measured in swaps.measured.items()]
    frames = []
    for name, swap, measured in named:
        for place, counts in measured.counts.items():
            total = counts.sum(0)
            about = {"swap": name, "shown": name in (BASELINE, *shown), "stack": place.stack}
            about |= {"layer": place.layer, "router_of": _home(swap, place).layer}
            used = {"expert": range(len(total)), "count": total}
            frames.append(pd.DataFrame(about | used | {"share": total / max(1, total.sum())}))
    return pd.concat(frames, ignore_index=True)


def distortion_table(swaps: Swaps, shown: Sequence[str], seed: int) -> pd.DataFrame:
    """How far each swap moves the use of experts, layer by layer, on the same tokens.

    Args:
        swaps: The measurements.
        shown: Names of the swaps that are drawn.
        seed: Seed of the random halves.

    Returns:
        One row per swap and layer: swap, shown, stack, layer, router_of, side (swapped; before the
        swap, so that nothing can change; or after its first layer); js_bits, the Jensen-Shannon
        divergence of the use of experts from that of the same router in the model as it is, with
        jackknife limits over documents or questions (_low, _high; NaN under 30); floor_bits, the
        mean divergence between random halves of these in the model as it is.
    """
    floors = {place: _floor(c, seed) for place, c in swaps.baseline.counts.items()}
    rows = []
    for swap, measured in swaps.measured.items():
        for place in measured.counts:
            estimates = left_out_divergences(swaps.baseline, swap, measured, place)
            low, high = limits(estimates)
            rows.append(
                {
                    "swap": swap.name,
                    "shown": swap.name in shown,
                    "stack": place.stack,
                    "layer": place.layer,
                    "router_of": _home(swap, place).layer,
                    "side": _side(swap, place),
                    "js_bits": estimates[0],
                    "js_bits_low": np.clip(low, 0, 1),
                    "js_bits_high": np.clip(high, 0, 1),
                    "floor_bits": floors[place],
                }
            )
    return pd.DataFrame(rows)


def left_out_divergences(
    baseline: Measured, swap: Swap, measured: Measured, place: Place
) -> Float[Array, " estimates"]:
    """Divergence at a layer over all groups, and then without each of them."""
    before, after = baseline.counts[_home(swap, place)], measured.counts[place]
    present = np.any([counts.any(1) for counts in baseline.counts.values()], axis=0)
    return jensen_shannon_bits(
        whole_and_left_out(before, present), whole_and_left_out(after, present)
    )


def _floor(counts: Int[Array, "groups experts"], seed: int) -> float:
    """Mean divergence between random halves of the groups."""
    random = np.random.default_rng(seed)
    found = counts[counts.any(1)]
    orders = [random.permutation(len(found)) for _ in range(_SPLITS)]
    halves = np.stack([found[order[: len(found) // 2]].sum(0) for order in orders])
    return float(jensen_shannon_bits(halves, counts.sum(0) - halves).mean())


def _side(swap: Swap, place: Place) -> str:
    """Where a layer stands in the order of the forward pass; the encoder comes first."""
    if place in swap.places:
        return "swapped"
    order = [(p.stack == "decoder", p.layer) for p in (place, *swap.places)]
    return "after" if order[0] > min(order[1:]) else "before"


def _home(swap: Swap | None, place: Place) -> Place:
    """Where the router of a layer stands in the model as it is."""
    return place if swap is None else swap.home.get(place, place)
