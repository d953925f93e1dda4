"""What can be set about `topk`, and the settings that this means for a model."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from moescope.config import IntList
from moescope.errors import OptionError
from moescope.interventions.choice import Weights
from moescope.models.view import MoELayer, MoEModel


@dataclass(frozen=True, kw_only=True)
class TopkOptions:
    """Options of `topk`."""

    k: IntList = ()
    """Experts per token to try, beside as many as the model uses; all from 0 if left out."""
    weights: tuple[Weights, ...] = ("as_is", "same_mass", "to_one")
    """What becomes of the weights of the experts that stay: `as_is`; `same_mass`, rescaled to the
    sum over all that the router chose; `to_one`, rescaled to the sum of one."""
    one_at_a_time: bool = False
    """Also restrict each layer alone, which takes as many passes again per layer."""
    tokens: int = 200_000
    """Most tokens of text to read, from the beginning of the corpus, which is balanced by
    domain."""
    bootstrap: int = 1_000
    """Resamples of documents behind each 95% interval."""
    seed: int = 0
    """Seed of the resamples, and of the tokens that forward passes are timed with."""

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise OptionError("tokens is too small", got=self.tokens, expected="at least 1")
        if not self.weights:
            raise OptionError("there is no treatment of weights to try")


class Setting(NamedTuple):
    """A restriction of the model."""

    layer: int | None
    """The model's own number of the one restricted layer; None for all."""
    weights: Weights
    """What becomes of the weights of the experts that stay."""
    k: int
    """Experts per token; layers that use fewer keep theirs."""


def restricted_layers(model: MoEModel, setting: Setting) -> Sequence[MoELayer]:
    """The layers that a setting is about."""
    return model.layers if setting.layer is None else [model.layer(setting.layer)]


def most_experts(layers: Sequence[MoELayer]) -> int:
    """K: how many experts per token the layers use at most."""
    return max(layer.top_k for layer in layers)


def settings_of(model: MoEModel, options: TopkOptions) -> list[Setting]:
    """Every setting that is asked for, those of all layers at once first.

    Raises:
        OptionError: More experts per token than any layer uses, or fewer than none.
    """
    most = most_experts(model.layers)
    for k in options.k:
        if not 0 <= k <= most:
            raise OptionError("no layer can use that many experts", got=k, expected=f"0 to {most}")
    found = _settings(None, most, options)
    for layer in model.layers if options.one_at_a_time else ():
        found += _settings(layer.index, layer.top_k, options)
    return found


def _settings(layer: int | None, most: int, options: TopkOptions) -> list[Setting]:
    asked = options.k or range(most)
    return [
        Setting(layer, weights, k)
        for weights in options.weights
        for k in sorted({most, *(k for k in asked if k < most)})
    ]


def run_of(model: MoEModel, setting: Setting) -> Setting | None:
    """The setting that stands for all that change the model alike; None for no change.

    Without experts there are no weights to treat; as many experts as the model uses, weighted as
    it does, are the model as it is.
    """
    most = most_experts(restricted_layers(model, setting))
    if setting.k == most and setting.weights != "to_one":
        return None
    return setting if setting.k else setting._replace(weights="as_is")
