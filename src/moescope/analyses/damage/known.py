"""Measures of every change, put together from those of experts and of pairs of experts."""

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pandas as pd

from moescope.analyses.damage.measures import (
    MEASURES,
    OF_PAIRS,
    Two,
    Values,
    of_experts,
    of_pairs,
)
from moescope.analyses.damage.options import DamageOptions
from moescope.analyses.damage.trials import Kind, Pair
from moescope.analyses.fits import Fits, Source
from moescope.corpora.packing import Batch


def known_measures(
    fits: Fits,
    batches: Sequence[Batch],
    experts: Sequence[Source],
    pairs: Sequence[Pair],
    options: DamageOptions,
) -> Mapping[Kind, pd.DataFrame]:
    """Columns of `MEASURES` for the changes of each kind, in the order of `trials`.

    Of an ablated expert likeness is that to its nearest among experts of its layer, and the FVU
    behind an adapter the lowest of experts elsewhere. Of a swap everything is the mean over both
    experts or both ways round; of a substitution use and norms are those of the expert replaced.
    """
    single = of_experts(fits, batches, experts)
    near, far = _neighbours(experts, options)
    alike = of_pairs(fits, [(e, other) for e in experts for other in near[e]], fitted=False)
    ways = [(pair.one, pair.other) for pair in pairs]
    back = [(pair.other, pair.one) for pair in pairs]
    elsewhere = [(e, other) for e in experts for other in far[e]]
    aligned = of_pairs(fits, [*ways, *back, *elsewhere], fitted=True)
    ablated = [
        single[e]
        | _best(alike, e, near[e], max)
        | {"aligned_fvu": _best(aligned, e, far[e], min)["aligned_fvu"]}
        for e in experts
    ]
    there, again = (
        pd.DataFrame([single[two[0]] | aligned[two] for two in way], columns=[*MEASURES])
        for way in (ways, back)
    )
    found: dict[Kind, pd.DataFrame] = {
        "zero": pd.DataFrame(ablated),
        "mask": pd.DataFrame(ablated),
        "swap": (there + again) / 2,
        "substitute": there,
    }
    return {kind: frame.reindex(columns=[*MEASURES]) for kind, frame in found.items()}


def _neighbours(
    experts: Sequence[Source], options: DamageOptions
) -> tuple[dict[Source, list[Source]], dict[Source, list[Source]]]:
    """For each expert some others of its layer, and some of other layers."""
    near: dict[Source, list[Source]] = {}
    far: dict[Source, list[Source]] = {}
    for number, expert in enumerate(experts):
        random = np.random.default_rng([options.seed, 2, number])
        for found, most, same in ((near, options.others, True), (far, options.targets, False)):
            some = [e for e in experts if (e.layer == expert.layer) == same and e != expert]
            chosen = random.permutation(len(some))[:most]
            found[expert] = [some[i] for i in sorted(chosen)]
    return near, far


def _best(
    known: Mapping[Two, Values],
    expert: Source,
    others: Sequence[Source],
    choose: Callable[[Sequence[float]], float],
) -> Values:
    """The highest or lowest of each measure of `OF_PAIRS` over some others; NaN for none."""
    found = {}
    for name in OF_PAIRS:
        values = [known[expert, other][name] for other in others]
        present = [value for value in values if not math.isnan(value)]
        found[name] = choose(present) if present else math.nan
    return found
