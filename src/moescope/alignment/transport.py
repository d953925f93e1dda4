"""The start of a full matrix: the transport of moments that lines up the linear parts."""

import math
from collections.abc import Sequence

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
_FEW = 256  # tokens that choose the gain
_SHARES = [0.02 * 10 ** (step / 6) for step in range(12)]


def transported_start(
    form: Form,
    train: Samples,
    source: SourceLinear,
    experts: ExpertStack,
    domains: Sequence[Domain],
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """First tensors of the forms with a full matrix, and the units of their steps.

    The nearer the start comes to the source, the smaller are the steps of the matrix.

    LayerNorm gives every token the same norm and takes the mean away. A constant far larger than
    what moves leaves it nearly linear: then it takes away one direction, that of the constant,
    which is chosen as the one that the target reads least.
    """
    maps = transports(source, experts, domains)
    size = maps.square().sum(2).mean(1, keepdim=True).sqrt()  # [fits, 1]
    weight = orthogonal(maps) if form == "orthogonal" else maps / size[:, :, None]
    mean = torch.stack([domain.whitening.mean for domain in domains])
    offset, stretch = torch.zeros_like(mean), 1.0
    if form == "layer_norm":
        offset, stretch = _OFFSET * least_read(experts), math.sqrt(1 + _OFFSET**2)
    mixed = torch.baddbmm(offset[:, None], train.inputs[:_FEW].expand(len(mean), -1, -1), weight.mT)
    if form == "layer_norm":
        mixed = layer_norm(mixed, mean.shape[-1:])
    moved = (mixed - offset[:, None] / stretch) * (stretch * size[:, None])
    share, error = best_share(moved, mean, experts, train)
    gain = share * stretch * size
    unit = _VECTOR_UNIT * stretch * size
    steps = _MATRIX_UNIT * error.clamp_max(1)
    tensors = {
        "weight": gain[:, :, None] * weight if form == "linear" else weight,
        "bias": offset,
        "gain": gain.clone() if form == "orthogonal" else gain.expand_as(mean).clone(),
        "shift": mean - offset / stretch * gain,
    }
    units = {
        "weight": (steps * size if form == "linear" else steps)[:, :, None],
        "bias": torch.full_like(size, _VECTOR_UNIT),
        "gain": unit,
        "shift": unit / stretch,
    }
    return tensors, units


def transports(
    source: SourceLinear, experts: ExpertStack, domains: Sequence[Domain]
) -> Float[Tensor, "fits hidden hidden"]:
    """For every target, the turn of the source's inputs that best lines up the linear parts.

    The rotation is the one for which the mean derivative of the target behind it comes nearest to
    that of the source (orthogonal Procrustes problem, Schoenemann 1966); the size is that of the
    target's inputs. Matching all second moments does worse: it blows up directions in which the
    source's inputs hardly move.

    Returns:
        [target input, coordinates of the task].
    """
    found = []
    for i, domain in enumerate(domains):
        jacobian = mean_jacobians(experts.keep(torch.tensor([i])), domain.inputs[None])[0]
        rotation = orthogonal(jacobian @ source.jacobian.T)
        found.append(domain.scale / source.scale * rotation @ source.back)
    return torch.stack(found)


def orthogonal(matrices: Float[Tensor, "*fits rows rows"]) -> Float[Tensor, "*fits rows rows"]:
    """The nearest orthogonal matrices."""
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    nearest: Tensor = left @ right
    return nearest


def least_read(experts: ExpertStack) -> Float[Tensor, "fits hidden"]:
    """The direction that gate and up read least: mean taken away, root mean square one."""
    gram = torch.bmm(experts.up, experts.up.mT)
    if experts.gate is not None:
        gram = torch.baddbmm(gram, experts.gate, experts.gate.mT)
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
