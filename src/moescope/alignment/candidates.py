"""Everything that is fitted for one source expert: its targets, and the controls beside them.

Experts are built when their chunk begins and dropped when it ends: random targets come from their
seeds, and only the shapes of all of them have to be known beforehand.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from moescope.alignment.controls import all_random, hidden_rotation, rotation_for, same_output_space
from moescope.alignment.domains import Domain
from moescope.alignment.forms import hidden_rank
from moescope.alignment.options import MINIMUM_TRAIN, RANDOM_SEEDS, FitOptions
from moescope.alignment.outcomes import Label
from moescope.alignment.randomness import generator
from moescope.alignment.samples import Samples
from moescope.alignment.solver import Task
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
        if not self.options.controls:
            return found
        labels: tuple[Label, ...] = tuple(("all random", j) for j in range(RANDOM_SEEDS))
        first = next(iter(self.targets.values()))
        found.append(Group(labels=labels, example=first, build=self._all_random))
        if self.source is not None:
            labels = (("self",),)
            found.append(Group(labels=labels, example=self.source, build=self._self))
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
            labels += tuple(("same output space", name, j) for j in range(RANDOM_SEEDS))
        return Group(labels=labels, example=target, build=build)

    def _all_random(self) -> dict[Label, Candidate]:
        domain = self._domain(self._pooled_inputs(), "all random")
        return {
            ("all random", j): self._candidate(expert, domain)
            for j, expert in enumerate(all_random(self.targets, self.options.seed))
        }

    def _self(self) -> dict[Label, Candidate]:
        assert self.source is not None
        rotation = rotation_for(
            self.train.hidden_size,
            self.options.seed,
            self.source_name,
            hidden_rank(self.options.form, self.options.rank),
        )
        rotation = rotation.to(self.train.inputs.device)
        # Told of its target's inputs as the pairs are: by other tokens than it is trained on.
        inner = self.inner if len(self.inner) >= MINIMUM_TRAIN else self.train
        turned = inner.inputs @ rotation.T if self.target_inputs else None
        expert = hidden_rotation(self._here(self.source), rotation)
        return {("self",): self._candidate(expert, self._domain(turned, self.source_name))}

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

    def _pooled_inputs(self) -> Tensor | None:
        """As many inputs of every target, never all of them in one tensor."""
        if not self.target_inputs:
            return None
        each = -(-_POOLED // len(self.target_inputs))
        chosen = []
        for name, inputs in sorted(self.target_inputs.items()):
            order = torch.randperm(
                len(inputs), generator=generator(self.options.seed, name, "pooled")
            )
            chosen.append(inputs[order[:each].to(inputs.device)].to(self.train.inputs.device))
        return torch.cat(chosen)


def _enough_inputs(
    targets: Mapping[str, ExpertWeights], target_inputs: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Inputs of those targets that have at least 64 of them.

    Fewer say too little of where a target's inputs lie to start from there.
    """
    known = {name: target_inputs[name] for name in targets if name in target_inputs}
    return {name: inputs for name, inputs in known.items() if len(inputs) >= MINIMUM_TRAIN}
