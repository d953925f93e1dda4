"""Coordinates in which the inputs have mean zero and nearly unit covariance."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Whitening:
    """`white = (x - mean) @ matrix`, with `matrix` symmetric."""

    mean: Float[Tensor, " hidden"]
    """Mean of the inputs."""
    matrix: Float[Tensor, "hidden hidden"]
    """Inverse square root of the shrunken covariance."""
    inverse: Float[Tensor, "hidden hidden"]
    """Square root of the shrunken covariance."""

    @classmethod
    def of(cls, x: Float[Tensor, "tokens hidden"], shrinkage: float) -> "Whitening":
        """Learn the coordinates, in fp64.

        The covariance is mixed with `shrinkage` times the identity at its mean variance
        (Ledoit and Wolf 2004), so that directions with little data are not blown up.
        """
        wide = x.double()
        mean = wide.mean(0)
        covariance = (wide - mean).T @ (wide - mean) / len(x)
        level = covariance.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
        eye = torch.eye(x.shape[1], dtype=torch.float64, device=x.device)
        values, vectors = torch.linalg.eigh((1 - shrinkage) * covariance + shrinkage * level * eye)
        root = values.clamp_min(float(shrinkage * level) / 2).sqrt()
        return cls(
            mean.float(),
            ((vectors / root) @ vectors.T).float(),
            ((vectors * root) @ vectors.T).float(),
        )

    def __call__(self, x: Float[Tensor, "tokens hidden"]) -> Float[Tensor, "tokens hidden"]:
        """Inputs in the new coordinates."""
        return (x - self.mean) @ self.matrix

    def fold(
        self, weight: Float[Tensor, "fits hidden hidden"], bias: Float[Tensor, "fits hidden"]
    ) -> tuple[Float[Tensor, "fits hidden hidden"], Float[Tensor, "fits hidden"]]:
        """The map on plain inputs that equals `weight`, `bias` on white ones."""
        plain = weight @ self.matrix
        return plain, bias - plain @ self.mean
