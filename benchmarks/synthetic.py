"""Experts and tokens made up for the benchmarks of alignment."""

import torch
from torch import Tensor
from torch.nn.functional import layer_norm

from moescope.experts.weights import ExpertWeights


def expert(hidden: int, wide: int, seed: int) -> ExpertWeights:
    """A gated expert whose outputs are about as large as its inputs."""
    generator = torch.Generator().manual_seed(seed)
    gate, up = (
        torch.randn(wide, hidden, generator=generator) * 1.5 / hidden**0.5 for _ in range(2)
    )
    return ExpertWeights(gate, up, torch.randn(hidden, wide, generator=generator) / wide**0.5)


def inputs(tokens: int, hidden: int, seed: int) -> Tensor:
    """[tokens, hidden]: a power-law spectrum and an offset, as LayerNorm leaves them."""
    generator = torch.Generator().manual_seed(seed)
    mixing, _ = torch.linalg.qr(torch.randn(hidden, hidden, generator=generator))
    spectrum = torch.arange(1, hidden + 1) ** -0.4
    x = torch.randn(tokens, hidden, generator=generator) * spectrum @ mixing
    return layer_norm(x + 0.1 * torch.randn(hidden, generator=generator), (hidden,))
