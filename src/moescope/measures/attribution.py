"""A norm whose scale is fixed, so that parts add up to a logit; the null of shuffled answers."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

_LARGE = 2.0**12  # so large that what a norm adds to the variance counts for nothing


class Norm(NamedTuple):
    """A norm as `bias + gain * (x - mean of x) / scale of x`, the mean only where it is centred."""

    gain: Float[Tensor, " hidden"]
    """What every dimension is multiplied with."""
    bias: Float[Tensor, " hidden"]
    """What is added afterwards."""
    centred: bool
    """Whether the mean over dimensions is taken off first (LayerNorm), or not (RMSNorm)."""

    @classmethod
    def of(cls, norm: Callable[[Tensor], Tensor], hidden: int) -> "Norm":
        """Read one off from what it makes of zeros, of equal numbers and of numbers of two signs.

        Args:
            norm: The norm, of rows of any number.
            hidden: Their width, which is even.
        """
        signs = torch.ones(hidden)
        signs[::2] = -1
        probes = torch.stack([torch.zeros(hidden), torch.ones(hidden), signs]) * _LARGE
        bias, equal, turned = norm(probes).float().cpu()
        gain = (turned - bias) * signs
        centred = bool((equal - bias).norm() < 0.5 * gain.norm())
        return cls(gain=gain, bias=bias, centred=centred)

    def fixed(self, x: Float[Tensor, "*tokens hidden"]) -> Float[Tensor, "*tokens hidden"]:
        """What it makes of x without bias, were the scale 1: linear in x."""
        return self.gain * (x - x.mean(-1, keepdim=True) if self.centred else x)

    def rates(
        self, x: Float[Tensor, "tokens hidden"], normed: Float[Tensor, "tokens hidden"]
    ) -> tuple[Float[Tensor, " tokens"], Float[Tensor, " tokens"]]:
        """One over the scale that the norm found for each x, and how badly that explains it.

        Args:
            x: What the norm was given.
            normed: What it made of them.

        Returns:
            1 / scale by least squares, and the norm of what is left over the norm of the whole.
        """
        linear, found = self.fixed(x.double()), normed.double() - self.bias
        rate = (linear * found).sum(1) / linear.square().sum(1)
        left = (found - rate[:, None] * linear).norm(dim=1) / found.norm(dim=1)
        return rate.float(), left.float()


def orders(prompts: int, draws: int, seed: int) -> Int64[np.ndarray, "draws prompts"]:
    """Random permutations of the prompts."""
    generator = np.random.default_rng(seed)
    return generator.permuted(np.tile(np.arange(prompts), (draws, 1)), axis=1)


def shuffled_means(
    values: Float[np.ndarray, "prompts answers"], shuffled: Int64[np.ndarray, "draws prompts"]
) -> Float[np.ndarray, " draws"]:
    """Mean over prompts of the value for the answer that each draw gives to a prompt.

    Args:
        values: Of every prompt with every answer.
        shuffled: Column of the answer of each prompt, by draw.
    """
    means: Float[np.ndarray, " draws"] = values[np.arange(len(values)), shuffled].mean(1)
    return means


def shuffle_p_values(
    observed: Float[np.ndarray, " experts"], drawn: Float[np.ndarray, "experts draws"]
) -> tuple[Float[np.ndarray, " experts"], Float[np.ndarray, " experts"]]:
    """How often a shuffle reaches what was observed: for each expert, and corrected for all.

    The same shuffles for all experts. Corrected by the largest of all experts in each shuffle, each
    in units of its own standard deviation over them (single-step maxT, Westfall and Young 1993).
    What was observed counts as one of the shuffles, so that no p is below 1 / (draws + 1).
    """
    every = np.concatenate([observed[:, None], drawn], axis=1)
    spread = every.std(1, keepdims=True)
    # Where no shuffle changes anything, all are equal but for rounding.
    flat = spread <= 1e-9 * np.abs(every).max(1, keepdims=True)
    units = np.where(flat, 0.0, (every - every.mean(1, keepdims=True)) / np.where(flat, 1, spread))
    reached = units[:, :1] - 1e-9 * np.abs(units[:, :1]) - 1e-12  # equal but for rounding
    p = (units >= reached).mean(1)
    largest = units.max(0)
    return p, (largest >= reached).mean(1)
