"""What may stand in for an expert that is taken out, the likeliest first."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Literal, NamedTuple

import torch

from moescope.alignment.controls import linear_map
from moescope.alignment.held_out import HeldOut
from moescope.alignment.randomness import generator
from moescope.analyses.fits import Fits, Fitted, Source, Target
from moescope.analyses.substitute.options import AdapterForm, SubstituteOptions
from moescope.analyses.substitute.sources import drawn, neighbours, targets_of
from moescope.experts.adapter import Adapter
from moescope.interventions import Expert, replace_output, substitute

By = Literal["zero", "mean", "linear", "best", "drawn", "random", "same_layer"]
"""What stands in: nothing; its own mean output; a linear map, no expert; the best of all experts of
other layers; the best of some of them; of as many random ones; of as many of its own layer."""


class Kind(NamedTuple):
    """How a stand-in comes about."""

    by: By
    """What it is."""
    form: str = ""
    """Of the adapter, as it was asked for; nothing where there is no expert behind one."""
    draw: int | None = None
    """Number of the draw of random experts."""
    tuned: bool = False
    """Whether its adapter was trained on the loss of the model afterwards."""


@dataclass(frozen=True, kw_only=True, eq=False)
class StandIn:
    """What computes the tokens of an expert in its place."""

    source: Source
    """The expert that is taken out."""
    kind: Kind
    """How it came about."""
    target: Target | None = None
    """The expert behind the adapter, if there is one."""
    inner_fvu: float
    """FVU on tokens set aside within the training documents: to choose by."""
    fvu: float
    """FVU on the held-out documents."""
    candidates: int = 1
    """How many it was chosen from."""
    adapter_parameters: int = 0
    """Numbers that have to be kept for it."""
    underdetermined: bool = False
    """Whether the form has more freedom than the tokens of the source can settle: a full adapter
    is fitted as a low-rank one then."""
    adapter: Callable[[], Adapter | None] = lambda: None
    """Its adapter or linear map; read when it is needed, for there may be many."""
    behind: Callable[[Adapter | None], AbstractContextManager[None]]
    """Has it compute the tokens of the source, with this adapter."""
    training: str = ""
    """How its adapter was trained on the loss of the model, if it was; part of its name."""

    def enter(self) -> AbstractContextManager[None]:
        """Have it compute the tokens of the source."""
        return self.behind(self.adapter())

    @property
    def name(self) -> str:
        """What it is: two of the same name are the same."""
        kind = self.kind
        what = kind.by if self.target is None else f"to-{self.target}-{kind.form}"
        return f"{self.source}-{what}{self.training}"

    def tuned(self, adapter: Adapter, training: str) -> "StandIn":
        """The same with an adapter that was trained further, which no longer aims at an FVU."""
        return replace(
            self,
            kind=self.kind._replace(tuned=True),
            inner_fvu=math.nan,
            fvu=math.nan,
            adapter=lambda: adapter,
            training=training,
        )


Choices = Mapping[Kind, Sequence[StandIn]]
"""What may stand in for one expert by kind; of each kind the least inner FVU first."""


def choices_of(
    fits: Mapping[AdapterForm, Fits], source: Source, options: SubstituteOptions
) -> Choices:
    """Fit what is missing.

    Args:
        fits: By form of the adapter.
        source: The expert that is taken out.
        options: Which targets, how many, seed.
    """
    found = dict[Kind, list[StandIn]]()
    for form, each in fits.items():
        if not found:
            found |= {one.kind: [one] for one in _without_expert(each, source)}
        for kind, targets in _targets(each, source, form, options).items():
            found[kind] = _fitted(each, source, kind, targets)
    return {kind: choices for kind, choices in found.items() if choices}


@torch.no_grad()
def _without_expert(fits: Fits, source: Source) -> list[StandIn]:
    """Zero- and mean-ablation, and the linear map."""
    trained, inner = fits.inner(source)
    mean, linear = fits.mean(source), fits.linear(source)
    # The map itself has seen the inner tokens: another one, that has not, tells what it costs.
    of_choice = generator(fits.options.seed, str(source), "blind map")
    blind = linear_map(*trained.split(fits.options.solver.inner_share, of_choice))
    expert: Expert = (fits.material.model.layer(source.layer), source.expert)
    _, held_out = fits.samples(source)
    here, there = HeldOut(inner, trained.outputs.mean(0)), HeldOut(held_out, mean)
    nothing = torch.zeros(())
    return [
        StandIn(
            source=source,
            kind=Kind("zero"),
            inner_fvu=here.fvu(nothing.expand_as(inner.outputs)),
            fvu=there.fvu(nothing.expand_as(held_out.outputs)),
            behind=lambda _: replace_output(expert, 0.0),
        ),
        StandIn(
            source=source,
            kind=Kind("mean"),
            inner_fvu=1.0,
            fvu=1.0,
            adapter_parameters=len(mean),
            behind=lambda _: replace_output(expert, mean),
        ),
        StandIn(
            source=source,
            kind=Kind("linear"),
            inner_fvu=here.fvu(blind(inner.inputs)),
            fvu=there.fvu(linear(held_out.inputs)),
            adapter_parameters=linear.num_parameters,
            adapter=lambda: linear,
            behind=lambda adapter: substitute(expert, None, adapter),
        ),
    ]


def _targets(
    fits: Fits, source: Source, form: AdapterForm, options: SubstituteOptions
) -> dict[Kind, list[Target]]:
    """Whom to choose from; what is compared with random experts has as many to choose from."""
    model, number = fits.material.model, options.candidates
    others, near = targets_of(model, source, options), neighbours(model, source)
    some = drawn(others, number, source, options.seed)
    found = {
        Kind("best", form): others,
        Kind("drawn", form): some,
        Kind("same_layer", form): drawn(near, number, source, options.seed),
    }
    for draw in range(options.random):
        random = [target._replace(random=draw) for target in some]
        found[Kind("random", form, draw)] = random
    return found


def _fitted(fits: Fits, source: Source, kind: Kind, targets: Sequence[Target]) -> list[StandIn]:
    found = list[StandIn]()
    for _, of_layer in groupby(targets, key=lambda target: target.layer):
        fitted = fits.between(source, list(of_layer))
        found += [
            _stand_in(fits, kind, one, len(targets))
            for one in fitted.values()
            if one.adapter is not None
        ]
    return sorted(found, key=lambda stand_in: stand_in.inner_fvu)


def _stand_in(fits: Fits, kind: Kind, fitted: Fitted, candidates: int) -> StandIn:
    source, target = fitted.source, fitted.target

    def adapter() -> Adapter | None:
        return fits.between(source, [target])[target].adapter

    # The adapter itself is not held on to.
    bare = replace(fitted, adapter=None)
    return StandIn(
        source=source,
        kind=kind,
        target=target,
        inner_fvu=fitted.inner_fvu,
        fvu=fitted.row["fvu"],
        candidates=candidates,
        adapter_parameters=fitted.row["adapter_parameters"],
        underdetermined=fitted.row["underdetermined"],
        adapter=adapter,
        behind=lambda given: fits.substituting(replace(bare, adapter=given)),
    )
