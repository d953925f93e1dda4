"""What can be set about `atlas`, and which experts it is about."""

from dataclasses import dataclass

import numpy as np

from moescope.alignment.options import FitOptions, Form, SolverOptions
from moescope.config import IntList
from moescope.errors import OptionError, require_least
from moescope.models.view import MoELayer, MoEModel


@dataclass(frozen=True, kw_only=True)
class AtlasOptions:
    """Options of `atlas`."""

    layers: IntList = ()
    """Decoder layers that take part, by the model's own numbers; all if left out."""
    experts_per_layer: int | None = 8
    """Experts of each layer, drawn once without weights, whatever their frequency, and the same for
    all pairs of layers; None for all."""
    shortlist: float = 0.5
    """Share of the experts of each target layer that get a short fit: those whose outputs overlap
    most with those of the imitated expert."""
    short_steps: int = 60
    """Optimiser steps of a short fit."""
    short_rank: int = 4
    """Rank of its low-rank adapter."""
    short_tokens: int = 600
    """Training tokens of a short fit."""
    survivors: int | None = 1
    """Experts of each target layer that get a converged fit: those of the best short fits. None for
    all, so that the screening itself can be judged."""
    rejected: int = 2
    """Random others, per imitated expert, that get a converged fit too: by them every run estimates
    what its screening misses."""
    form: Form = "low_rank"
    """What the adapter of a converged fit may do, as in `align`."""
    rank: int = 16
    """Rank of its delta; of `low_rank` alone."""
    steps: int = 300
    """Most optimiser steps of a converged fit."""
    controls: bool = True
    """Fit the controls too; without them there is no score."""
    held_out_share: float = 0.2
    """Share of every domain's documents kept for the reported errors."""
    max_tokens: int = 2_000
    """Most tokens of an imitated expert, training and held out together."""
    seed: int = 0
    """Seed of every random choice."""

    def __post_init__(self) -> None:
        least = {"experts_per_layer": 1, "survivors": 1, "short_steps": 1, "rejected": 0}
        least |= {"short_rank": 0, "short_tokens": 1, "max_tokens": 1}
        require_least(self, least)
        for name, value in {
            "shortlist": self.shortlist,
            "held_out_share": self.held_out_share,
        }.items():
            if not 0 < value <= 1 or (name == "held_out_share" and value == 1):
                raise OptionError(f"{name} is no share", got=value, expected="between 0 and 1")
        self.converged_fit()

    def short_fit(self) -> FitOptions:
        """Options of the fits that screen."""
        # Few tokens: a larger part of them than usual tells the fits apart.
        solver = SolverOptions(steps=self.short_steps, batch_tokens=128, inner_share=0.3)
        return FitOptions(
            form="low_rank",
            rank=self.short_rank,
            controls=False,
            seed=self.seed,
            solver=solver,
        )

    def converged_fit(self) -> FitOptions:
        """Options of the fits that are reported.

        Raises:
            OptionError: The options do not fit one another.
        """
        return FitOptions(
            form=self.form,
            rank=self.rank,
            controls=self.controls,
            seed=self.seed,
            solver=SolverOptions(steps=self.steps),
        )


def decoder_layers(model: MoEModel, options: AtlasOptions) -> list[MoELayer]:
    """The layers that take part.

    Raises:
        OptionError: There is no pair of them, or no such layer.
    """
    there = [layer for layer in model.layers if layer.stack == "decoder"]
    chosen = [model.layer(number) for number in sorted(set(options.layers))] or there
    if len(chosen) < 2:
        raise OptionError(
            f"there is no pair of decoder layers with experts to compare in {model.name}",
            got=f"{len(chosen)} layer{'' if len(chosen) == 1 else 's'} of {len(there)}",
            expected="two or more",
        )
    return chosen


def sampled_experts(model: MoEModel, options: AtlasOptions) -> dict[int, list[int]]:
    """Numbers of the experts of each layer that take part, ascending.

    Raises:
        OptionError: There is no pair of layers.
    """
    chosen = {}
    for layer in decoder_layers(model, options):
        random = np.random.default_rng([options.seed, layer.index])
        order = random.permutation(layer.num_experts)[: options.experts_per_layer]
        chosen[layer.index] = sorted(order.tolist())
    return chosen


def shortlisted(experts: int, options: AtlasOptions) -> int:
    """How many of so many experts of a target layer get a short fit."""
    least = min(experts, options.survivors or 1)
    return max(least, round(options.shortlist * experts))
