"""Random numbers that depend on what they are for, never on the order of the work."""

import hashlib
import json

import torch
from jaxtyping import Float
from torch import Tensor


def seed_of(seed: int, *purpose: str | int) -> int:
    """A seed of its own for every purpose."""
    digest = hashlib.sha256(json.dumps([seed, *purpose]).encode()).digest()
    return int.from_bytes(digest[:8], "little") % 2**63


def generator(seed: int, *purpose: str | int) -> torch.Generator:
    """A generator of its own for every purpose: same seed and purpose, same numbers."""
    return torch.Generator().manual_seed(seed_of(seed, *purpose))


def random_rotation(hidden: int, source: torch.Generator) -> Float[Tensor, "hidden hidden"]:
    """An orthogonal matrix, uniform over all of them (Mezzadri, arXiv math-ph/0609050)."""
    normal = torch.randn(hidden, hidden, dtype=torch.float64, generator=source)
    q, r = torch.linalg.qr(normal)
    rotation: Tensor = (q * r.diagonal().sign()).float()
    return rotation
