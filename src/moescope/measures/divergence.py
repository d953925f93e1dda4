"""How far apart two samples lie: Gaussian Kullback-Leibler divergence and MMD."""

import torch
from jaxtyping import Float
from torch import Tensor


def gaussian_kl(
    mean_p: Float[Tensor, "*#batch hidden"],
    covariance_p: Float[Tensor, "*#batch hidden hidden"],
    mean_q: Float[Tensor, "*#batch hidden"],
    covariance_q: Float[Tensor, "*#batch hidden hidden"],
) -> Float[Tensor, "*batch"]:
    """KL(p || q) of two Gaussians, in nats; NaN where a covariance is not positive definite.

    [tr(Cq^-1 Cp) + (mq - mp)' Cq^-1 (mq - mp) - hidden + ln det Cq - ln det Cp] / 2
    """
    root_p, root_q = _cholesky(covariance_p), _cholesky(covariance_q)
    moved = torch.linalg.solve_triangular(root_q, (mean_p - mean_q)[..., None], upper=False)
    turned = torch.linalg.solve_triangular(root_q, root_p, upper=False)
    volumes = _log_diagonal(root_q) - _log_diagonal(root_p)  # half of the log determinants
    quadratic = turned.square().sum((-2, -1)) + moved.square().sum((-2, -1))
    divergence: Tensor = (quadratic - mean_p.shape[-1]) / 2 + volumes
    return divergence


def shrunken_moments(
    x: Float[Tensor, "*batch tokens hidden"], shrinkage: float, floor: Float[Tensor, ""]
) -> tuple[Float[Tensor, "*batch hidden"], Float[Tensor, "*batch hidden hidden"]]:
    """Mean and covariance, with a share of its own diagonal mixed in (Schaefer and Strimmer 2005).

    Variances stay as they are, correlations are multiplied by `1 - shrinkage`; so the scale is not
    biased, however few the tokens. `floor` is added to every variance.
    """
    mean = x.mean(-2)
    centred = x - mean[..., None, :]
    covariance = centred.mT @ centred / x.shape[-2]
    diagonal = shrinkage * covariance.diagonal(dim1=-2, dim2=-1) + floor
    return mean, (1 - shrinkage) * covariance + torch.diag_embed(diagonal)


def mmd(
    x: Float[Tensor, "*#batch tokens hidden"],
    y: Float[Tensor, "*#batch others hidden"],
    bandwidth: Float[Tensor, "*#batch"],
) -> Float[Tensor, "*batch"]:
    """Squared maximum mean discrepancy, unbiased (Gretton et al. 2012, eq. 3).

    The kernel is `exp(-distance^2 / (2 bandwidth^2))`. Unbiased, so below zero half of the time
    where both samples come from one distribution; NaN under two tokens on a side.
    """
    scale = 2 * bandwidth[..., None, None].square()
    middle = y.mean(-2, keepdim=True)  # cancels, but for rounding
    x, y = x - middle, y - middle

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return torch.exp(-squared_distances(a, b) / scale)

    def within(a: Tensor) -> Tensor:
        number = a.shape[-2]
        pairs = kernel(a, a)
        own = pairs.diagonal(dim1=-2, dim2=-1).sum(-1)
        return (pairs.sum((-2, -1)) - own) / (number * (number - 1) or torch.nan)

    return within(x) + within(y) - 2 * kernel(x, y).mean((-2, -1))


def median_bandwidth(x: Float[Tensor, "*batch tokens hidden"]) -> Float[Tensor, "*batch"]:
    """Median distance between two different tokens, the usual bandwidth of an RBF kernel."""
    centred = x - x.mean(-2, keepdim=True)
    own = torch.eye(x.shape[-2], dtype=torch.bool, device=x.device)
    distances = squared_distances(centred, centred).masked_fill(own, torch.nan)
    median = distances.flatten(-2).nanmedian(-1).values
    # Never zero: tokens that are all alike have a kernel that is 1 for equal ones, 0 for others.
    return median.sqrt().clamp_min(_SMALLEST)


def squared_distances(
    x: Float[Tensor, "*#batch tokens hidden"], y: Float[Tensor, "*#batch others hidden"]
) -> Float[Tensor, "*batch tokens others"]:
    """Squared Euclidean distance of every token from every other."""
    norms = x.square().sum(-1)[..., :, None] + y.square().sum(-1)[..., None, :]
    return (norms - 2 * x @ y.mT).clamp_min(0)


_SMALLEST = 1e-15  # its square is still a number in fp32


def _cholesky(covariance: Tensor) -> Tensor:
    root, failed = torch.linalg.cholesky_ex(covariance)
    return torch.where(failed[..., None, None] == 0, root, torch.nan)


def _log_diagonal(root: Tensor) -> Tensor:
    return root.diagonal(dim1=-2, dim2=-1).log().sum(-1)
