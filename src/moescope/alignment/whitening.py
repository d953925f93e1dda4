"""Coordinates in which the inputs have mean zero and nearly unit covariance."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Whitening:
    """`white = (x - mean) @ matrix`."""

    mean: Float[Tensor, " hidden"]
    """Mean of the inputs."""
    matrix: Float[Tensor, "hidden hidden"]
    """Inverse square root of the shrunken covariance, or less of it."""
    inverse: Float[Tensor, "hidden hidden"]
    """Inverse of `matrix`."""

    @classmethod
    def of(
        cls, x: Float[Tensor, "tokens hidden"], shrinkage: float, power: float = 0.5
    ) -> "Whitening":
        """Learn the coordinates, in fp64.

        The covariance is mixed with `shrinkage` times its own diagonal (Schaefer and Strimmer
        2005), so that directions with little data are not blown up, whatever the scale of single
        dimensions.

        Args:
            x: The inputs.
            shrinkage: How much of the diagonal.
            power: Of the covariance in the inverse of the matrix. With less than a half the inputs
                are white in part; their mean variance is one all the same.
        """
        wide = x.double()
        mean = wide.mean(0)
        covariance = (wide - mean).T @ (wide - mean) / len(x)
        variances = covariance.diagonal()
        floor = _floor(wide, variances)
        diagonal = torch.diag(variances.clamp_min(floor))
        values, vectors = torch.linalg.eigh((1 - shrinkage) * covariance + shrinkage * diagonal)
        values = values.clamp_min(max(shrinkage / 2, 1e-6) * floor)
        root = values**power
        root *= (values / root**2).mean().sqrt()
        return cls(
            mean.float(),
            ((vectors / root) @ vectors.T).float(),
            ((vectors * root) @ vectors.T).float(),
        )

    @classmethod
    def by_dimension(cls, x: Float[Tensor, "tokens hidden"]) -> "Whitening":
        """Every dimension at unit variance: what `of` does with the diagonal alone."""
        wide = x.double()
        variances = (wide - wide.mean(0)).square().mean(0)
        root = variances.clamp_min(_floor(wide, variances)).sqrt()
        return cls(wide.mean(0).float(), torch.diag(1 / root).float(), torch.diag(root).float())

    @classmethod
    def in_part(cls, x: Float[Tensor, "tokens hidden"], shrinkage: float) -> "Whitening":
        """Every dimension at unit variance, then half way to white."""
        scaled = cls.by_dimension(x)
        rest = cls.of(scaled(x), shrinkage, power=0.25)
        return cls(scaled.mean, scaled.matrix @ rest.matrix, rest.inverse @ scaled.inverse)

    def __call__(self, x: Float[Tensor, "tokens hidden"]) -> Float[Tensor, "tokens hidden"]:
        """Inputs in the new coordinates."""
        return (x - self.mean) @ self.matrix

    def fold(
        self, weight: Float[Tensor, "fits hidden hidden"], bias: Float[Tensor, "fits hidden"]
    ) -> tuple[Float[Tensor, "fits hidden hidden"], Float[Tensor, "fits hidden"]]:
        """The map on plain inputs that equals `weight`, `bias` on white ones."""
        plain = weight @ self.matrix.mT
        return plain, bias - plain @ self.mean


def _floor(wide: Tensor, variances: Tensor) -> Tensor:
    """Least variance: a dimension that never moves gets a small one of its own."""
    return (1e-6 * variances.mean() + 1e-12 * wide.square().mean()).clamp_min(1e-30)
