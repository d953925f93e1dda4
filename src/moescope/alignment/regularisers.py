"""How far the adapted inputs A(x) lie from the inputs that the target expert knows.

Gaussian KL is measured in coordinates in which the target's inputs are white, in nats per
dimension, so that every direction counts alike; the squared MMD in the plain ones, so that large
dimensions count most.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from moescope.alignment.domains import Domain
from moescope.alignment.options import Regulariser
from moescope.measures.divergence import gaussian_kl, median_bandwidth, mmd, shrunken_moments

_FLOOR = 1e-6  # of the target's variance: what never moves is far away, but not infinitely
_TOKENS = 1_024  # of either sample in a reported MMD, whose cost grows with their square


def penalty(
    name: Regulariser, z: Float[Tensor, "fits tokens hidden"], domains: Sequence[Domain]
) -> Float[Tensor, " fits"]:
    """What is added to the loss of each fit, before its weight.

    Args:
        name: "gaussian_kl": KL of A(x) from the target's inputs, nats per dimension. "mmd":
            squared MMD with the median distance of the target's inputs as bandwidth. "none": 0.
        z: Adapted inputs of a batch of tokens; there may be fewer tokens than dimensions.
        domains: Where the inputs of each fit's target lie; where they are not known, nothing is
            added.
    """
    if name == "none":
        return z.new_zeros(len(z))
    return torch.stack([_of_one(name, *fit) for fit in zip(z, domains, strict=True)])


def _of_one(name: Regulariser, z: Float[Tensor, "tokens hidden"], domain: Domain) -> Tensor:
    if not domain.known:
        return z.new_zeros(())
    if name == "gaussian_kl":
        return _kl(z, domain.inputs)
    return _mmd(z, _spread_out(domain.inputs, len(z)))


@torch.no_grad()
def divergences(
    z: Float[Tensor, "*fits tokens hidden"], target_inputs: Float[Tensor, "others hidden"]
) -> tuple[Float[Tensor, "*fits"], Float[Tensor, "*fits"]]:
    """Gaussian KL in nats per dimension, and squared MMD, of inputs from those of the target.

    Both covariances are shrunk (`shrinkage`): the KL is a figure to compare, before and after at
    equal tokens, not one to take by itself.

    Args:
        z: Inputs given to the target, such as x and A(x) on the same tokens.
        target_inputs: The target's own.
    """
    z, known = z.double(), target_inputs.double()
    return _kl(z, known), _mmd(_spread_out(z, _TOKENS), _spread_out(known, _TOKENS))


def shrinkage(tokens: int, hidden: int) -> float:
    """Share of the diagonal: as if `hidden` tokens without correlations had been seen besides."""
    return hidden / (tokens + hidden)


def _kl(
    z: Float[Tensor, "*fits tokens hidden"], known: Float[Tensor, "others hidden"]
) -> Float[Tensor, "*fits"]:
    """KL of `z` from the Gaussian of `known`, in nats per dimension.

    In its white coordinates, for there a share of the diagonal can be mixed into the covariance of
    a few tokens without pulling them off the Gaussian they come from.
    """
    hidden = known.shape[-1]
    floor = _FLOOR * known.var(0, correction=0).mean()
    centre, covariance = shrunken_moments(known, shrinkage(*known.shape), floor)
    root = torch.linalg.cholesky_ex(covariance).L
    white = torch.linalg.solve_triangular(root, (z - centre).mT, upper=False).mT
    moments = shrunken_moments(white, shrinkage(*white.shape[-2:]), root.new_tensor(_FLOOR))
    eye = torch.eye(hidden, dtype=root.dtype, device=root.device)
    return gaussian_kl(*moments, torch.zeros_like(centre), eye) / hidden


def _mmd(
    z: Float[Tensor, "*fits tokens hidden"], known: Float[Tensor, "others hidden"]
) -> Float[Tensor, "*fits"]:
    return mmd(z, known, median_bandwidth(known))


def _spread_out(x: Float[Tensor, "*fits tokens hidden"], most: int) -> Tensor:
    """At most `most` tokens, evenly spread, so that neighbours in a text do not stand for all."""
    step = -(-x.shape[-2] // most)
    return x[..., ::step, :]
