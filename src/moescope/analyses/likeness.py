"""How well the experts of a model imitate one another behind adapters, all with all.

An FVU says how much of a source's outputs is missed, in units of their own spread. But some
sources are easy: a linear map without any expert imitates them well. So errors are compared as

    relative error of b for a = FVU of b behind its adapter for a / null of a
    null of a                 = FVU of the best linear map for a, at most 1, the constant
    distance of a and b       = the larger of the relative errors of b for a and of a for b

all on tokens set aside within the training documents. 0: each imitates the other without error.
1: one of them is imitated no better than without any expert.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float

from moescope.alignment.controls import linear_map
from moescope.alignment.held_out import HeldOut
from moescope.alignment.options import FitOptions, Form, SolverOptions
from moescope.alignment.randomness import generator
from moescope.analyses.align.options import Layers
from moescope.analyses.align.tokens import Tokens
from moescope.analyses.fits import Fits, Source, Target
from moescope.analyses.material import Material
from moescope.errors import CaptureError, OptionError
from moescope.models.view import MoELayer, MoEModel
from moescope.progress import track

_LEAST_NULL = 1e-3
"""Nulls below it count as it: such a source is a linear map."""
FEWEST = 4
"""Experts below which there is nothing to group."""


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
    """Random choices of each kind to compare with, at most 5."""
    bootstrap: int = 1_000
    """Resamples of documents behind each 95% interval."""
    seed: int = 0
    """Seed of every random choice."""

    def __post_init__(self) -> None:
        lowest = {"experts_per_layer": 0, "max_tokens": 1, "tokens": 1, "random": 1}
        for name, least in lowest.items():
            value = getattr(self, name)
            if value < least:
                raise OptionError(f"{name} is too small", got=value, expected=f"at least {least}")
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
    """The experts that take part, layer by layer."""
    found = []
    for layer in chosen_layers(model, options.layers):
        random = np.random.default_rng([options.seed, layer.index])
        order = random.permutation(layer.num_experts)
        size = options.experts_per_layer or layer.num_experts
        found += [Source(layer.index, expert) for expert in sorted(order[:size].tolist())]
    return found


@dataclass(frozen=True, kw_only=True, eq=False)
class Likeness:
    """Errors of every expert in the place of every other. Rows are sources, columns targets."""

    experts: Sequence[Source]
    """Those with enough tokens."""
    left_out: Sequence[Source]
    """Those without."""
    inner_fvu: Float[np.ndarray, "sources targets"]
    """FVU inside the training documents, to choose by; 0 for an expert in its own place."""
    fvu: Float[np.ndarray, "sources targets"]
    """FVU on the held-out documents."""
    null: Float[np.ndarray, " sources"]
    """Inner FVU of the best linear map without any expert, at most 1."""
    linear_fvu: Float[np.ndarray, " sources"]
    """FVU of the linear map on the held-out documents."""

    @classmethod
    def of(cls, fits: Fits, experts: Sequence[Source], random: int | None = None) -> "Likeness":
        """Fit what is missing, all experts with all.

        Args:
            fits: The adapters.
            experts: Who takes part.
            random: Take, in the place of every target, its random expert of this number, which
                has its down projection and nothing else of it. None: the targets themselves.

        Raises:
            CaptureError: Fewer than four experts have enough tokens, or the capture lacks inputs.
        """
        size = len(experts)
        inner, held_out = np.zeros((size, size)), np.zeros((size, size))
        null, linear = np.full(size, np.nan), np.full(size, np.nan)
        for i, source in enumerate(track(experts, "adapters: source experts")):
            targets = [Target(*expert, random) for expert in experts if expert != source]
            for target, fitted in fits.between(source, targets).items():
                j = experts.index(Source(target.layer, target.expert))
                inner[i, j], held_out[i, j] = fitted.inner_fvu, fitted.row["fvu"]
                linear[i] = fitted.row["fvu_linear"]
            if not np.isnan(inner[i]).any():
                null[i] = null_fvu(fits, source)
        there = ~np.isnan(null)
        if there.sum() < FEWEST:
            raise CaptureError(
                "too few experts have tokens enough for adapters",
                got=f"{int(there.sum())} of {size}",
                expected=f"at least {FEWEST}",
                remedy="Choose more, or capture more tokens, with a larger tokens_per_expert",
            )
        return cls(
            experts=[expert for expert, is_there in zip(experts, there, strict=True) if is_there],
            left_out=[e for e, is_there in zip(experts, there, strict=True) if not is_there],
            inner_fvu=inner[np.ix_(there, there)],
            fvu=held_out[np.ix_(there, there)],
            null=null[there],
            linear_fvu=linear[there],
        )

    def part(self, experts: Sequence[Source]) -> "Likeness":
        """That of some of them, in this order."""
        rows = [self.experts.index(expert) for expert in experts]
        return Likeness(
            experts=list(experts),
            left_out=[],
            inner_fvu=self.inner_fvu[np.ix_(rows, rows)],
            fvu=self.fvu[np.ix_(rows, rows)],
            null=self.null[rows],
            linear_fvu=self.linear_fvu[rows],
        )

    @cached_property
    def relative(self) -> Float[np.ndarray, "sources targets"]:
        """Inner FVU over the null of the source."""
        return np.asarray(self.inner_fvu / np.maximum(self.null, _LEAST_NULL)[:, None])

    @cached_property
    def distances(self) -> Float[np.ndarray, "experts experts"]:
        """The larger of the relative errors of both directions."""
        return np.asarray(np.maximum(self.relative, self.relative.T))


def null_fvu(fits: Fits, source: Source) -> float:
    """Inner FVU of the best linear map, fitted without the inner tokens, or 1 if that is less."""
    trained, inner = fits.inner(source)
    purpose = generator(fits.options.seed, str(source), "penalty of the null")
    fitted_on, aside = trained.split(fits.options.solver.inner_share, purpose)
    given = linear_map(fitted_on, aside)(inner.inputs)
    return min(1.0, HeldOut(inner, trained.outputs.mean(0)).fvu(given))


def tokens_by_expert(
    tokens: Tokens, experts: Sequence[Source], *, held_out: bool
) -> Mapping[Source, int]:
    """How many tokens of the training, or of the held-out, documents used each expert."""
    capture, found = tokens.capture, dict[Source, int]()
    for layer in sorted({expert.layer for expert in experts}):
        used = torch.zeros(capture.layer_facts(layer)["num_experts"], dtype=torch.int64)
        for where, routing in capture.routing_shards(layer):
            own = routing.experts[tokens.held_out[capture.documents[where]] == held_out].long()
            used += own[own >= 0].bincount(minlength=len(used))
        found |= {e: int(used[e.expert]) for e in experts if e.layer == layer}
    return found


def expert_parameters(model: MoEModel, experts: Sequence[Source]) -> int:
    """Numbers in all of them."""
    return sum(model.layer(e.layer).expert_weights(e.expert).num_parameters for e in experts)


def fitting_operations(model: MoEModel, options: LikenessOptions, experts: int) -> float:
    """Floating-point operations of fitting so many experts all with all, at most."""
    layer = max(model.layers, key=lambda each: each.intermediate_size)
    per_token = 6.0 * layer.hidden_size * (layer.hidden_size + 3 * layer.intermediate_size)
    return experts * (experts - 1) * options.steps * SolverOptions().batch_tokens * per_token
