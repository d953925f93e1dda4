"""How much work an atlas is: floating-point operations from shapes, tokens and steps."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from moescope.alignment.optimiser import PRODUCTS
from moescope.alignment.options import RANDOM_SEEDS, FitOptions
from moescope.alignment.published import STEPS, TOKENS
from moescope.alignment.transport import FEW
from moescope.analyses.align.cost import FULL_MATRIX
from moescope.analyses.atlas.options import AtlasOptions, decoder_layers, shortlisted
from moescope.models.view import MoEModel

_OF_A_SOURCE = 60
"""Times hidden size to the third: whitening, and the linear map with its penalties."""
_STARTS = 12
"""Sizes that a fit tries before its first step."""
_LOOKS = 5
"""Times that held-out tokens go through a target of a converged fit: itself and its controls."""


class Shape(NamedTuple):
    """One layer."""

    experts: int
    """Routed experts."""
    hidden: int
    """Width of inputs and outputs."""
    wide: int
    """Neurons of an expert."""


@dataclass(frozen=True, kw_only=True)
class Counts:
    """What an atlas takes."""

    sources: int
    """Imitated experts."""
    pairs: int
    """Pairs of experts that are looked at."""
    short_fits: int
    """Short fits."""
    converged_pairs: int
    """Pairs with a converged fit."""
    converged_fits: int
    """Converged fits, controls among them."""
    short_operations: float
    """Floating-point operations of the short fits."""
    converged_operations: float
    """Those of the converged ones."""

    @property
    def operations(self) -> float:
        """All of them."""
        return self.short_operations + self.converged_operations


def shapes_of(model: MoEModel, options: AtlasOptions) -> list[Shape]:
    """The layers that take part.

    Raises:
        OptionError: There is no pair of them.
    """
    layers = decoder_layers(model, options)
    return [Shape(la.num_experts, la.hidden_size, la.intermediate_size) for la in layers]


def counts(shapes: Sequence[Shape], options: AtlasOptions) -> Counts:
    """What an atlas of these layers takes at most: early stopping makes it less."""
    found = [_of_source(i, shapes, options) for i in range(len(shapes))]
    sources = [_drawn(shape, options) for shape in shapes]

    def total(name: str) -> float:
        return float(sum(n * one[name] for n, one in zip(sources, found, strict=True)))

    whole = ("pairs", "short_fits", "converged_pairs", "converged_fits")
    return Counts(
        sources=sum(sources),
        **{name: round(total(name)) for name in whole},
        short_operations=total("short_operations"),
        converged_operations=total("converged_operations"),
    )


def _of_source(number: int, shapes: Sequence[Shape], options: AtlasOptions) -> dict[str, float]:
    """For one imitated expert of the layer of this number."""
    train = round((1 - options.held_out_share) * options.max_tokens)
    others = [shape for i, shape in enumerate(shapes) if i != number]
    found = {"pairs": 0.0, "short_fits": 0.0, "converged_pairs": 0.0}
    found |= {"short_operations": 0.0, "converged_operations": 0.0}
    kept = [min(options.survivors or shape.experts, _drawn(shape, options)) for shape in others]
    left = [_drawn(shape, options) - k for shape, k in zip(others, kept, strict=True)]
    # Drawn without weights from all that are left.
    share = min(1.0, options.rejected / max(1, sum(left)))
    for shape, k, rejected in zip(others, kept, left, strict=True):
        short = shortlisted(_drawn(shape, options), options)
        fitted = k + share * rejected
        found["pairs"] += k + rejected
        found["short_fits"] += short
        found["converged_pairs"] += fitted
        found["short_operations"] += short * short_operations(shape, options, train)
        found["converged_operations"] += fitted * pair_operations(shape, options, train)
    found["converged_operations"] += source_operations(shapes[number], others, options, train)
    found["converged_fits"] = fits_of(round(found["converged_pairs"]), kinds_of(others), options)
    return found


def kinds_of(targets: Iterable[Shape]) -> set[tuple[int, int]]:
    """Widths of experts: those of one share their all-random controls."""
    return {(shape.hidden, shape.wide) for shape in targets}


def fits_of(pairs: int, kinds: Collection[tuple[int, int]], options: AtlasOptions) -> int:
    """Converged fits of one imitated expert and so many targets: controls and ceiling too."""
    if not options.controls:
        return pairs
    return pairs * (1 + RANDOM_SEEDS) + len(kinds) * RANDOM_SEEDS + 1


def short_operations(target: Shape, options: AtlasOptions, train: int) -> float:
    """One short fit, of an imitated expert with so many training tokens."""
    return fit_operations(target, options.short_fit(), min(options.short_tokens, train))


def pair_operations(target: Shape, options: AtlasOptions, train: int) -> float:
    """One pair with a converged fit, its own controls, and the published number beside it."""
    fits = 1 + RANDOM_SEEDS * options.controls
    held_out = train * options.held_out_share / (1 - options.held_out_share)
    published = STEPS * min(TOKENS, train) * (2 * _expert(target) + 4 * target.hidden**2)
    looks = _LOOKS * held_out * _expert(target)
    return fits * fit_operations(target, options.converged_fit(), train) + published + looks


def source_operations(
    source: Shape, targets: Iterable[Shape], options: AtlasOptions, train: int
) -> float:
    """What all converged fits of an imitated expert share: all-random controls, and its ceiling."""
    total = float(_OF_A_SOURCE * source.hidden**3)
    if options.controls:
        random = RANDOM_SEEDS * [Shape(1, *kind) for kind in sorted(kinds_of(targets))]
        for shape in [source, *random]:
            total += fit_operations(shape, options.converged_fit(), train)
    return total


def fit_operations(shape: Shape, options: FitOptions, train: int) -> float:
    """One fit: its steps, its looks at the inner tokens, Muon's products of full matrices.

    Args:
        shape: Of the target.
        options: Form, rank, steps, batch.
        train: Training tokens, inner ones included.
    """
    solver, hidden = options.solver, shape.hidden
    adapter = 4.0 * hidden * options.rank
    if options.form in FULL_MATRIX:
        adapter = 2.0 * hidden**2
    batch = min(solver.batch_tokens, (1 - solver.inner_share) * train)
    looked_at = solver.inner_share * train / solver.evaluate_every
    # Back through the expert to its input, not to its weights; through the adapter to its weights.
    step = batch * (2 * _expert(shape) + 3 * adapter) + looked_at * (_expert(shape) + adapter)
    if options.form in FULL_MATRIX:
        step += PRODUCTS * 2 * hidden**3
    return solver.steps * step + _STARTS * min(FEW, train) * _expert(shape)


def _expert(shape: Shape) -> float:
    """One token forth through a gated expert."""
    return 6.0 * shape.hidden * shape.wide


def _drawn(shape: Shape, options: AtlasOptions) -> int:
    return min(options.experts_per_layer or shape.experts, shape.experts)
