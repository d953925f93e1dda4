"""Passes over what is read: the model as it is, and once for each swap."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from jaxtyping import Int64

from moescope.analyses.swap_blocks.kept import Kept, Measured
from moescope.analyses.swap_blocks.reading import Reading
from moescope.captures.places import Place
from moescope.corpora.corpus import RESERVED_DOMAIN
from moescope.errors import MoEScopeError, OptionError
from moescope.evaluate.answers import per_question
from moescope.evaluate.paired import BASELINE
from moescope.evaluate.predictions import evaluating
from moescope.evaluate.totals import Totals
from moescope.measures.jackknife import GROUPS
from moescope.measures.routing import count_experts
from moescope.models.observe import Observation, observe
from moescope.models.view import MoEModel
from moescope.progress import track

Change = Callable[[], AbstractContextManager[None]]


@dataclass(frozen=True, eq=False, kw_only=True)
class Swap:
    """An exchange of two blocks or of two experts."""

    name: str
    """As tables and figures name it, such as `1-3`."""
    file: str
    """What its measurements are kept as."""
    columns: Mapping[str, object]
    """What tells it apart in tables."""
    places: tuple[Place, Place]
    """The layers that it is about."""
    change: Change
    """Makes what exchanges them for a while."""
    home: Mapping[Place, Place] = field(default_factory=dict)
    """Where routers that stand elsewhere meanwhile stand else, by place."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Swaps:
    """Swaps, and what was measured."""

    baseline: Measured
    """The model as it is."""
    measured: Mapping[Swap, Measured]
    """Every swap that could be made."""
    refused: Mapping[Swap, str]
    """The others, and why."""
    reading: Reading
    """What was read."""


def read_unchanged(model: MoEModel, reading: Reading, kept: Kept | None) -> Measured:
    """The pass of the model as it is."""
    return _measure(model, reading, nullcontext, kept, BASELINE)


def run_swaps(
    model: MoEModel,
    reading: Reading,
    swaps: Sequence[Swap],
    baseline: Measured,
    kept: Kept | None = None,
) -> Swaps:
    """Read everything once with each swap.

    Nothing is loaded again or copied but the tensors that a swap of experts itself exchanges. What
    `kept` holds already is not read again.

    Args:
        model: The model; it is put into evaluation mode meanwhile.
        reading: What is read.
        swaps: The swaps.
        baseline: What `read_unchanged` gave.
        kept: Where measurements are kept; None for nowhere.

    Raises:
        OptionError: No swap can be made; the message says why the first cannot.
    """
    refused = {swap: reason for swap in swaps if (reason := _refusal(swap))}
    possible = [swap for swap in swaps if swap not in refused]
    if not possible:
        raise OptionError("none of the swaps can be made", got=next(iter(refused.values()), None))
    measured = {
        swap: _measure(model, reading, swap.change, kept, swap.file)
        for swap in track(possible, "swaps")
    }
    return Swaps(baseline=baseline, measured=measured, refused=refused, reading=reading)


def _refusal(swap: Swap) -> str:
    """Why a swap cannot be made; nothing where it can."""
    try:
        with swap.change():
            return ""
    except MoEScopeError as error:
        return str(error)


def _measure(
    model: MoEModel, reading: Reading, change: Change, kept: Kept | None, name: str
) -> Measured:
    """One pass: losses by document or question, and how often each expert is used in any layer."""
    if kept is not None and (found := kept.load(name)) is not None:
        return found
    totals = Totals([RESERVED_DOMAIN])
    counts = {
        Place.of(layer): np.zeros((GROUPS, layer.num_experts), dtype=np.int64)
        for layer in model.layers
    }
    groups: dict[str, Int64[np.ndarray, " tokens"]] = {}

    def count(seen: Observation) -> None:
        groups_of = groups[seen.layer.stack]
        counted = groups_of >= 0
        experts = seen.routing.experts.cpu().numpy()[counted]
        count_experts(counts[Place.of(seen.layer)], groups_of[counted], experts)

    with evaluating(model), change(), observe(model.layers, count):
        for passage in reading.passages:
            for stack in {layer.stack for layer in model.layers}:
                units = passage.units(stack).numpy()
                groups[stack] = np.where(units < 0, -1, units % GROUPS)
            totals.add(*passage.read(model))
    measured = Measured(_by_unit(reading, totals), counts)
    if kept is not None:
        kept.save(name, measured)
    return measured


def _by_unit(reading: Reading, totals: Totals) -> pd.DataFrame:
    if reading.unit == "questions":
        return per_question(totals).reset_index(drop=True)
    _, sums = next(totals.by_domain())
    return sums.reset_index(drop=True)
