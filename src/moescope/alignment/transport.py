"""The start of a full matrix: the transport of moments that lines up the linear parts."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import layer_norm

from moescope.alignment.domains import Domain
from moescope.alignment.linear_parts import SourceLinear, mean_jacobians
from moescope.alignment.samples import Samples
from moescope.alignment.stack import ExpertStack
from moescope.experts.adapter import Form

_OFFSET = 5.0  # spread of the bias before LayerNorm, times that of what moves
_MATRIX_UNIT = 0.5
_VECTOR_UNIT = 1 / 6
FEW = 256
"""Tokens of the source that choose how far the inputs of a target are moved."""
_SHARES = [0.02 * 10 ** (step / 6) for step in range(12)]


def transported_start(
    form: Form,
    train: Samples,
    source: SourceLinear,
    experts: ExpertStack,
    domains: Sequence[Domain],
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """First tensors of the forms with a full matrix, and the units of their steps.

    Of the maps by three kinds of moments the one that leaves least error. The nearer it comes to
    the source, the smaller are the steps of the matrix.
    """
    means = torch.stack([domain.whitening.mean for domain in domains])
    even = torch.stack([domain.scale.expand_as(domain.spread) for domain in domains])
    uneven = torch.stack([domain.spread for domain in domains])
    jacobians = torch.cat(
        [
            mean_jacobians(experts.keep(torch.tensor([i])), domain.inputs[None])
            for i, domain in enumerate(domains)
        ]
    )
    scale = source.spread.square().mean().sqrt().expand_as(source.spread)
    diag = torch.diag_embed
    moments = [(diag(scale), diag(1 / scale), diag(even))]
    spread = even
    if form != "orthogonal":
        full = torch.stack([domain.whitening.inverse for domain in domains])
        moments.append((diag(source.spread), diag(1 / source.spread), diag(uneven)))
        moments.append((source.white.inverse, source.white.matrix, full))
        spread = uneven
    unread = least_read(experts, spread) if form == "layer_norm" else None
    best: _Start | None = None
    for root, inverse, roots in moments:
        maps = torch.bmm(
            aligned(source, root, jacobians, roots), _each(inverse @ source.back, roots)
        )
        maps = maps / spread[:, :, None]
        found = _Start.of(form, maps, spread, means, unread, experts, train)
        best = found if best is None else best.or_better(found)
    assert best is not None
    return best.tensors, best.units


def aligned(
    source: SourceLinear,
    root: Float[Tensor, "hidden hidden"],
    jacobians: Float[Tensor, "fits hidden hidden"],
    roots: Float[Tensor, "fits hidden hidden"],
) -> Float[Tensor, "fits hidden hidden"]:
    """For every target, the map to its inputs that keeps moments and best lines up linear parts.

    The source's inputs, divided by the root of their moments, are turned and take up the moments
    of the target's. The turn is the one for which the mean derivative of the target behind the map
    comes nearest to that of the source (orthogonal Procrustes problem, Schoenemann 1966).

    Args:
        source: Linear part of the source.
        root: Of the moments of its inputs: their size, their spreads, or all of the covariance.
        jacobians: Mean Jacobians of the targets, [in, out].
        roots: As `root`, of the inputs of each target.

    Returns:
        [target input, source input over its root].
    """
    products = torch.bmm(torch.bmm(roots, jacobians), _each((root @ source.jacobian).mT, roots))
    return torch.bmm(roots, orthogonal(products))


def _each(matrix: Tensor, like: Tensor) -> Tensor:
    # A product of all fits at once would be rounded by their number.
    return matrix.expand_as(like)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Start:
    """Where fits may begin, and how well."""

    tensors: dict[str, Tensor]
    units: dict[str, Tensor]
    error: Float[Tensor, "fits 1"]
    """On a few tokens, as a fraction of the variance."""

    @classmethod
    def of(
        cls,
        form: Form,
        maps: Float[Tensor, "fits hidden hidden"],
        spread: Float[Tensor, "fits hidden"],
        means: Float[Tensor, "fits hidden"],
        unread: Float[Tensor, "fits hidden"] | None,
        experts: ExpertStack,
        train: Samples,
    ) -> "_Start":
        """From maps to the target's inputs, in units of their spread.

        LayerNorm gives every token the same norm and takes the mean away. A constant far larger
        than what moves leaves it nearly linear: then it takes away one direction, that of the
        constant, which is `unread`: the one that the target reads least.
        """
        size = maps.square().sum(2).mean(1, keepdim=True).sqrt()  # [fits, 1]
        weight = orthogonal(maps) if form == "orthogonal" else maps / size[:, :, None]
        offset, stretch = torch.zeros_like(means), 1.0
        if unread is not None:
            offset, stretch = _OFFSET * unread, math.sqrt(1 + _OFFSET**2)
        few = train.inputs[:FEW].expand(len(means), -1, -1)
        mixed = torch.bmm(few, weight.mT) + offset[:, None]
        if unread is not None:
            mixed = layer_norm(mixed, means.shape[-1:])
        reach = stretch * size * spread  # [fits, hidden]
        moved = (mixed - offset[:, None] / stretch) * reach[:, None]
        share, error = best_share(moved, means, experts, train)
        gain, steps = share * reach, _MATRIX_UNIT * error.clamp_max(1)[:, :, None]
        one = gain[:, :1] if form == "orthogonal" else gain
        tensors = {
            "weight": gain[:, :, None] * weight if form == "linear" else weight,
            "bias": offset,
            "gain": one.clone(),
            "shift": means - offset / stretch * gain,
        }
        units = {
            "weight": steps * reach[:, :, None] if form == "linear" else steps,
            "bias": torch.full_like(size, _VECTOR_UNIT),
            "gain": _VECTOR_UNIT * (reach[:, :1] if form == "orthogonal" else reach),
            "shift": _VECTOR_UNIT * reach / stretch,
        }
        return cls(tensors=tensors, units=units, error=error)

    def or_better(self, other: "_Start") -> "_Start":
        """For every fit the one with the smaller error."""

        def chosen(mine: Tensor, theirs: Tensor) -> Tensor:
            better = (other.error < self.error).reshape(-1, *[1] * (mine.ndim - 1))
            return torch.where(better, theirs, mine)

        return _Start(
            tensors={name: chosen(t, other.tensors[name]) for name, t in self.tensors.items()},
            units={name: chosen(t, other.units[name]) for name, t in self.units.items()},
            error=chosen(self.error, other.error),
        )


def orthogonal(matrices: Float[Tensor, "*fits rows rows"]) -> Float[Tensor, "*fits rows rows"]:
    """The nearest orthogonal matrices."""
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    nearest: Tensor = left @ right
    return nearest


def least_read(
    experts: ExpertStack, spread: Float[Tensor, "fits hidden"]
) -> Float[Tensor, "fits hidden"]:
    """The direction that gate and up read least, in units of the spread of their inputs.

    Its mean is taken away, its root mean square is one.
    """
    gram = torch.bmm(experts.up, experts.up.mT)
    if experts.gate is not None:
        gram = torch.baddbmm(gram, experts.gate, experts.gate.mT)
    gram = spread[:, :, None] * gram * spread[:, None]
    direction = torch.linalg.eigh(gram)[1][:, :, 0]
    return layer_norm(direction, direction.shape[-1:], eps=1e-12)


def best_share(
    moved: Float[Tensor, "fits few hidden"],
    mean: Float[Tensor, "fits hidden"],
    experts: ExpertStack,
    train: Samples,
) -> tuple[Float[Tensor, "fits 1"], Float[Tensor, "fits 1"]]:
    """How far to move the target's inputs from their mean: the share with the least error.

    Near one where the experts do the same, small where they have nothing in common: too large a
    start ends above the best constant output.

    Args:
        moved: By how much the adapter would move them, for the first tokens.
        mean: Of the target's inputs.
        experts: The targets.
        train: The tokens of the source.

    Returns:
        The share, and its error as a fraction of the variance.
    """
    y = train.outputs[: moved.shape[1]]
    variance = (y - train.outputs.mean(0)).square().sum(1).mean().clamp_min(1e-30)
    errors = torch.stack(
        [
            (experts(share * moved + mean[:, None]) - y).square().sum(2).mean(1) / variance
            for share in _SHARES
        ]
    )
    least, where = errors.min(0)
    return mean.new_tensor(_SHARES)[where][:, None], least[:, None]
