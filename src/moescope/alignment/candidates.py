"""Everything that is fitted for one source expert: its targets, and the controls beside them.

Experts are built when their chunk begins and dropped when it ends: random targets come from their
seeds, and only the shapes of all of them have to be known beforehand.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from moescope.alignment.checks import say_enough
from moescope.alignment.controls import all_random, hidden_rotation, rotation_for, same_output_space
from moescope.alignment.domains import Domain
from moescope.alignment.forms import hidden_rank
from moescope.alignment.options import MINIMUM_TRAIN, RANDOM_SEEDS, FitOptions
from moescope.alignment.outcomes import ControlLabels, Label
from moescope.alignment.randomness import generator
from moescope.alignment.samples import Samples
from moescope.alignment.solver import Task
from moescope.alignment.stack import same_shape
from moescope.experts.weights import ExpertWeights

_POOLED = 1_024
"""Inputs that say where those of an all-random target lie."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Candidate:
    """One target to fit."""

    expert: ExpertWeights
    """The expert behind the adapter, in fp32 on the device of the tokens."""
    domain: Domain
    """Where its inputs lie."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Group:
    """Candidates of one shape whose inputs lie in one place: they are built together."""

    labels: tuple[Label, ...]
    """What they are."""
    example: ExpertWeights
    """An expert of their shape."""
    build: Callable[[], dict[Label, Candidate]]
    """Make them."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Workshop:
    """Builds the candidates of one source expert."""

    train: Samples
    """Training tokens, in fp32."""
    rest: Samples
    """Those of them that weights are trained on."""
    inner: Samples
    """The others, for early stopping and choice."""
    source: ExpertWeights | None
    """The expert that made their outputs, where known."""
    source_name: str
    """Keys the random choices of this source."""
    targets: Mapping[str, ExpertWeights]
    """Experts to fit, in any dtype and on any device."""
    target_inputs: Mapping[str, Float[Tensor, "..."]]
    """Inputs of the targets in their own layer, where known and enough of them."""
    options: FitOptions
    """Seed, shrinkage, form; whether there are controls."""

    @classmethod
    def of(
        cls,
        train: Samples,
        targets: Mapping[str, ExpertWeights],
        target_inputs: Mapping[str, Float[Tensor, "..."]],
        source: ExpertWeights | None,
        source_name: str,
        options: FitOptions,
    ) -> "Workshop":
        """Set inner tokens aside, and leave out inputs of targets that have too few."""
        rest, inner = train.split(
            options.solver.inner_share, generator(options.seed, source_name, "inner tokens")
        )
        return cls(
            train=train,
            rest=rest,
            inner=inner,
            source=source,
            source_name=source_name,
            targets=targets,
            target_inputs=_enough_inputs(targets, target_inputs),
            options=options,
        )

    def task(self, options: FitOptions) -> Task:
        """What the converged fits share, by options that may differ in form and steps."""

        def order() -> torch.Generator:
            return generator(options.seed, self.source_name, "order of the tokens")

        return Task.of(self.rest, self.inner, options, order, self.source)

    def groups(self) -> list[Group]:
        """The targets and, unless switched off, random targets and the hidden-rotation self."""
        found = [self._target(name) for name in self.targets]
        if self.options.controls:
            found += [self._all_random(crowd) for crowd in self._crowds]
            told = sorted({name in self.target_inputs for name in self.targets})
            found += [] if self.source is None else [self._self(self.source, t) for t in told]
        return found

    def controls(self, name: str) -> ControlLabels:
        """What a target is compared with."""
        (crowd,) = (crowd for crowd in self._crowds if name in crowd)
        return ControlLabels(
            same_output_space=_seeds("same output space", name),
            all_random=_seeds("all random", crowd[0]),
            ceiling=_ceiling(name in self.target_inputs),
        )

    @cached_property
    def _crowds(self) -> list[tuple[str, ...]]:
        """Targets that share all-random ones: of one shape, inputs known of all or of none."""
        found = []
        for told in (True, False):
            names = [n for n in sorted(self.targets) if (n in self.target_inputs) == told]
            alike = same_shape([self.targets[name] for name in names])
            found += [tuple(names[i] for i in same) for same in alike]
        return found

    def _target(self, name: str) -> Group:
        target = self.targets[name]

        def build() -> dict[Label, Candidate]:
            domain = self._domain(self.target_inputs.get(name), name)
            found = {labels[0]: self._candidate(target, domain)}
            if self.options.controls:
                random = same_output_space(target, self.options.seed, name)
                for label, expert in zip(labels[1:], random, strict=True):
                    found[label] = self._candidate(expert, domain)
            return found

        labels: tuple[Label, ...] = (("pair", name),)
        if self.options.controls:
            labels += _seeds("same output space", name)
        return Group(labels=labels, example=target, build=build)

    def _all_random(self, crowd: Sequence[str]) -> Group:
        targets = [self.targets[name] for name in crowd]
        labels = _seeds("all random", crowd[0])

        def build() -> dict[Label, Candidate]:
            domain = self._domain(self._pooled_inputs(crowd), "all random")
            experts = all_random(targets, self.options.seed)
            return {
                label: self._candidate(expert, domain)
                for label, expert in zip(labels, experts, strict=True)
            }

        return Group(labels=labels, example=targets[0], build=build)

    def _self(self, source: ExpertWeights, told: bool) -> Group:
        """`told`: whether of its inputs, as the pairs that it is the ceiling of."""

        def build() -> dict[Label, Candidate]:
            rotation = rotation_for(
                self.train.hidden_size,
                self.options.seed,
                self.source_name,
                hidden_rank(self.options.form, self.options.rank),
            )
            rotation = rotation.to(self.train.inputs.device)
            # By other tokens than it is trained on, as the pairs are.
            inner = self.inner if len(self.inner) >= MINIMUM_TRAIN else self.train
            turned = inner.inputs @ rotation.T if told else None
            expert = hidden_rotation(self._here(source), rotation)
            return {_ceiling(told): self._candidate(expert, self._domain(turned, self.source_name))}

        return Group(labels=(_ceiling(told),), example=source, build=build)

    def _candidate(self, expert: ExpertWeights, domain: Domain) -> Candidate:
        return Candidate(expert=self._here(expert), domain=domain)

    def _here(self, expert: ExpertWeights) -> ExpertWeights:
        return expert.to(dtype=torch.float32, device=self.train.inputs.device)

    def _domain(self, inputs: Tensor | None, name: str) -> Domain:
        source_of_choice = generator(self.options.seed, name, "domain")
        if inputs is None:
            return Domain.unknown(
                self.train.inputs, self.options.solver.shrinkage, source_of_choice
            )
        here = inputs.to(self.train.inputs.device).float()
        return Domain.of(here, self.options.solver.shrinkage, source_of_choice)

    def _pooled_inputs(self, crowd: Sequence[str]) -> Tensor | None:
        """As many inputs of every target, never all of them in one tensor."""
        if crowd[0] not in self.target_inputs:
            return None
        each = -(-_POOLED // len(crowd))
        chosen = []
        for name in crowd:
            inputs = self.target_inputs[name]
            order = torch.randperm(
                len(inputs), generator=generator(self.options.seed, name, "pooled")
            )
            chosen.append(inputs[order[:each].to(inputs.device)].to(self.train.inputs.device))
        return torch.cat(chosen)


def _seeds(*kind: str) -> tuple[Label, ...]:
    return tuple((*kind, j) for j in range(RANDOM_SEEDS))


def _ceiling(told: bool) -> Label:
    return ("self", "inputs known" if told else "inputs unknown")


def _enough_inputs(
    targets: Mapping[str, ExpertWeights], target_inputs: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Inputs of those targets where they say enough to start from there."""
    known = {name: target_inputs[name] for name in targets if name in target_inputs}
    return {name: inputs for name, inputs in known.items() if say_enough(inputs)}
