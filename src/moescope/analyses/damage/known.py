"""Measures of every change, put together from those of experts and of pairs of experts."""

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pandas as pd

from moescope.analyses.damage.measures import (
    MEASURES,
    OF_PAIRS,
    inner_fvus,
    of_experts,
    of_pairs,
)
from moescope.analyses.damage.options import DamageOptions
from moescope.analyses.damage.trials import Kind, Pair, named
from moescope.analyses.fits import Fits, Source
from moescope.corpora.packing import Batch
from moescope.progress import track


def known_measures(
    fits: Fits,
    batches: Sequence[Batch],
    experts: Sequence[Source],
    pairs: Sequence[Pair],
    options: DamageOptions,
) -> Mapping[Kind, pd.DataFrame]:
    """Columns of `MEASURES` for the changes of each kind, one row each, named by `Trial.where`.

    Of an ablated expert likeness is that to its nearest among experts of its layer, and the FVU
    behind an adapter the lowest of experts elsewhere. Of a swap everything is the mean over both
    experts or both ways round; of a substitution use and norms are those of the expert replaced.
    """
    single = of_experts(fits, batches, experts)
    near, far = _neighbours(experts, options)
    alike = of_pairs(fits, [(e, other) for e in experts for other in near[e]], fitted=False)
    ways = [(pair.one, pair.other) for pair in pairs]
    back = [(pair.other, pair.one) for pair in pairs]
    both = of_pairs(fits, [*ways, *back], fitted=True)
    ablated = [
        single[e]
        | {name: _best([alike[e, other][name] for other in near[e]], max) for name in OF_PAIRS}
        | {"aligned_fvu": _best(inner_fvus(fits, e, far[e]), min)}
        for e in track(experts, "damage: experts of other layers")
    ]
    there, again = (
        pd.DataFrame([single[two[0]] | both[two] for two in way], columns=[*MEASURES])
        for way in (ways, back)
    )
    of_pair = [named(*two) for two in ways]
    alone = pd.DataFrame(ablated, index=[named(e) for e in experts], columns=[*MEASURES])
    return {
        "zero": alone,
        "mask": alone,
        "swap": ((there + again) / 2).set_axis(of_pair),
        "substitute": there.set_axis(of_pair),
    }


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


def _best(values: Sequence[float], choose: Callable[[Sequence[float]], float]) -> float:
    """The highest or lowest of those that are known; NaN for none."""
    present = [value for value in values if not math.isnan(value)]
    return choose(present) if present else math.nan
