"""What can be set about `align`, and which layers and experts it means."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, NamedTuple

from pydantic import BeforeValidator

from moescope.alignment.options import FitOptions, Form, Protocol, Regulariser
from moescope.config import IntList
from moescope.errors import OptionError
from moescope.models.view import MoELayer, MoEModel


class LayerPair(NamedTuple):
    """Two layers, by the model's own numbers."""

    source: int
    """Its experts are imitated."""
    target: int
    """Its experts imitate them."""

    def __str__(self) -> str:
        return f"{self.source} \u2192 {self.target}"


def _several(value: object) -> object:
    return (value,) if isinstance(value, int) else value


Layers = Annotated[IntList, BeforeValidator(_several)]
"""Layer numbers; a single one may stand by itself."""


@dataclass(frozen=True, kw_only=True)
class AlignOptions:
    """Options of `align`."""

    source: Layers = ()
    """Layers whose experts are imitated, by the model's own numbers; one for each of `target`.
    Both left out: every layer with the next one that has experts."""
    target: Layers = ()
    """Layers whose experts imitate them."""
    source_experts: IntList = ()
    """Experts of the source layers; all if left out."""
    target_experts: IntList = ()
    """Experts of the target layers; all if left out."""
    protocol: Protocol = "converged"
    """`converged`, or `published`: ten Adam steps, as in MoE Align."""
    form: Form = "layer_norm"
    """What the adapter may do: `layer_norm`, MoE Align's LayerNorm(W x + b); `low_rank`, a diagonal
    and a delta of `rank` in place of W; `linear`, no LayerNorm; `orthogonal`, a rotation, a scale
    and a shift; `scale`, a gain and a shift; `identity`, nothing."""
    rank: int = 16
    """Rank of the delta; of `low_rank` alone."""
    regulariser: Regulariser = "none"
    """Keeps the changed inputs near those that the target has in its own layer: `gaussian_kl`,
    `mmd`, or `none`."""
    regulariser_weight: float = 1.0
    """Weight of the regulariser beside the FVU."""
    controls: bool = True
    """Fit the controls too; without them there is no score."""
    learning_curve: bool = False
    """Fit again on an eighth, a quarter and half of the training tokens."""
    capacity: bool = False
    """Fit adapters of rising rank, real against random experts."""
    matched: bool = False
    """Train every source expert of the call on as many tokens as the one that has least."""
    held_out_share: float = 0.2
    """Share of every domain's documents kept for the reported errors."""
    max_tokens: int = 5_000
    """Most tokens of a source expert, training and held out together."""
    budget_seconds: float | None = None
    """Most seconds for all fits of one source expert; each part of its learning curve may take as
    long again, and its capacity curves together. None for no limit."""
    seed: int = 0
    """Seed of every random choice."""

    def __post_init__(self) -> None:
        if len(self.source) != len(self.target):
            raise OptionError(
                "`source` and `target` do not make pairs of layers",
                got=f"{len(self.source)} and {len(self.target)} layers",
                expected="as many of one as of the other, or neither",
            )
        if not 0 < self.held_out_share < 1:
            raise OptionError(
                "held_out_share is not a share", got=self.held_out_share, expected="0 to 1"
            )
        if self.max_tokens < 1:
            raise OptionError(
                "max_tokens leaves no tokens", got=self.max_tokens, expected="1 or more"
            )
        if self.capacity and self.protocol == "published":
            raise OptionError(
                "a capacity curve has no published protocol",
                got="capacity with protocol published",
                remedy="Leave out one of them",
            )
        self.fit_options(self.budget_seconds)

    def fit_options(self, budget_seconds: float | None) -> FitOptions:
        """What of it concerns a single fit.

        Raises:
            OptionError: The options do not fit one another.
        """
        return FitOptions(
            protocol=self.protocol,
            form=self.form,
            rank=self.rank,
            regulariser=self.regulariser,
            regulariser_weight=self.regulariser_weight,
            controls=self.controls,
            budget_seconds=budget_seconds,
            seed=self.seed,
        )


def layer_pairs(model: MoEModel, options: AlignOptions) -> list[LayerPair]:
    """The pairs of layers to align, each once.

    Raises:
        OptionError: The model has no two layers with experts, or not the ones asked for.
    """
    if options.source:
        pairs = [LayerPair(*pair) for pair in zip(options.source, options.target, strict=True)]
    else:
        pairs = [
            LayerPair(a.index, b.index)
            for a, b in pairwise(la for la in model.layers if la.stack == "decoder")
        ]
    for layer in {layer for pair in pairs for layer in pair}:
        model.layer(layer)
    if not pairs:
        raise OptionError(
            f"{model.name} has no pair of layers with experts", got=f"{len(model.layers)} layer"
        )
    return list(dict.fromkeys(pairs))


def experts_of(layer: MoELayer, chosen: Sequence[int]) -> list[int]:
    """The chosen experts, or all.

    Raises:
        OptionError: The layer lacks one of them.
    """
    for expert in chosen:
        if not 0 <= expert < layer.num_experts:
            raise OptionError(
                f"layer {layer.index} has no expert {expert}",
                expected=f"0 to {layer.num_experts - 1}",
            )
    return list(dict.fromkeys(chosen)) or list(range(layer.num_experts))
