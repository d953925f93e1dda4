"""What can be set about analyses of how well the experts imitate one another."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from moescope.alignment.options import FitOptions, Form, SolverOptions
from moescope.analyses.align.options import Layers
from moescope.analyses.fits import Fits, Source
from moescope.analyses.material import Material
from moescope.errors import ModelError, OptionError, require_least
from moescope.models.view import MoELayer, MoEModel


@dataclass(frozen=True, kw_only=True)
class LikenessOptions:
    """Which experts are compared, how adapters are fitted, and what losses are measured on."""

    layers: Layers = ()
    """Layers whose experts take part, by the model's own numbers; all if left out."""
    experts_per_layer: int = 0
    """Most experts of a layer that take part, drawn at random; 0 for all. The others stay as they
    are and stand in for nobody."""
    form: Form = "low_rank"
    """What the adapters may do, as of `align`."""
    rank: int = 16
    """Rank of their delta; of `low_rank` alone."""
    steps: int = 300
    """Most optimiser steps of a fit."""
    max_tokens: int = 2_000
    """Most tokens of a source expert, training and held out together."""
    held_out_share: float = 0.2
    """Share of every domain's documents that losses and reported errors are measured on."""
    tokens: int = 200_000
    """Most tokens of text to take held-out documents from, from its beginning."""
    random: int = 3
    """Random choices of each kind to compare with, 2 to 5: how much they differ counts, so that
    few of them show little."""
    bootstrap: int = 1_000
    """Resamples of documents behind each 95% interval."""
    seed: int = 0
    """Seed of every random choice."""

    def __post_init__(self) -> None:
        lowest = {"experts_per_layer": 0, "max_tokens": 1, "tokens": 1, "random": 2, "bootstrap": 1}
        require_least(self, lowest)
        if self.random > 5:
            raise OptionError("random is too large", got=self.random, expected="at most 5")
        if not 0 < self.held_out_share < 1:
            raise OptionError(
                "held_out_share is not a share", got=self.held_out_share, expected="0 to 1"
            )
        self.fit_options()

    @property
    def behind_losses(self) -> dict[str, object]:
        """Options that losses may depend on: all but those of their intervals."""
        return {name: value for name, value in asdict(self).items() if name != "bootstrap"}

    def fit_options(self) -> FitOptions:
        """What of it concerns a single fit."""
        return FitOptions(
            form=self.form,
            rank=self.rank,
            controls=False,
            seed=self.seed,
            solver=SolverOptions(steps=self.steps),
        )

    def fits(self, material: Material) -> Fits:
        """The adapters of a run with these options."""
        return Fits.of(
            material,
            self.fit_options(),
            held_out_share=self.held_out_share,
            max_tokens=self.max_tokens,
        )


def chosen_layers(model: MoEModel, layers: Sequence[int]) -> list[MoELayer]:
    """Those of these numbers, or all, in the order of the model.

    Raises:
        OptionError: One of them is dense or does not exist.
    """
    wanted = {model.layer(layer) for layer in layers}
    return [layer for layer in model.layers if not layers or layer in wanted]


def chosen_experts(model: MoEModel, options: LikenessOptions) -> list[Source]:
    """The experts that take part, layer by layer: those that have parameters."""
    found = []
    for layer in chosen_layers(model, options.layers):
        random = np.random.default_rng([options.seed, layer.index])
        order = random.permutation(layer.num_experts).tolist()
        own = [expert for expert in order if _has_parameters(layer, expert)]
        size = options.experts_per_layer or len(own)
        found += [Source(layer.index, expert) for expert in sorted(own[:size])]
    return found


def _has_parameters(layer: MoELayer, expert: int) -> bool:
    """Some models have experts that give back what they get."""
    try:
        return bool(layer.expert_tensors(expert))
    except ModelError:  # quantised or offloaded
        return True


def fitting_operations(model: MoEModel, options: LikenessOptions, experts: int) -> float:
    """Floating-point operations of fitting so many experts all with all, at most."""
    layer = max(model.layers, key=lambda each: each.intermediate_size)
    per_token = 6.0 * layer.hidden_size * (layer.hidden_size + 3 * layer.intermediate_size)
    return experts * (experts - 1) * options.steps * SolverOptions().batch_tokens * per_token
