"""Experts and tokens with known answers."""

import torch
from torch.nn.functional import layer_norm

from moescope.alignment.samples import Samples
from moescope.experts.weights import ExpertWeights


def expert(hidden=16, wide=24, seed=0, size=1.0):
    """A gated expert whose outputs are about as large as its inputs."""
    g = torch.Generator().manual_seed(seed)
    gate, up = (torch.randn(wide, hidden, generator=g) * 1.5 / hidden**0.5 for _ in range(2))
    down = torch.randn(hidden, wide, generator=g) * size / wide**0.5
    return ExpertWeights(gate, up, down)


def normalised(tokens=1_500, hidden=16, seed=0):
    """Inputs as LayerNorm leaves them, with a spectrum that falls off and an offset."""
    g = torch.Generator().manual_seed(seed)
    mixing = torch.randn(hidden, hidden, generator=g)
    scale = torch.linspace(1.5, 0.3, hidden)
    x = torch.randn(tokens, hidden, generator=g) * scale @ mixing + torch.randn(hidden, generator=g)
    return layer_norm(x, (hidden,))


def documents(tokens, number):
    """Contiguous documents of equal length."""
    return torch.arange(tokens) * number // tokens


def samples(source, x, held_out=0.25, number=160):
    """Training and held-out tokens of a source expert, split by document."""
    everything = Samples(x, source(x), documents(len(x), number))
    last = everything.documents >= (1 - held_out) * number
    return everything.where(~last), everything.where(last)


def reparametrised(source, rotation):
    """The target `f(R x) = source(x)` for a rotation R that keeps the mean: R commutes with LN."""
    return ExpertWeights(source.gate @ rotation.T, source.up @ rotation.T, source.down)


def rotation_keeping_the_mean(hidden=16, seed=0):
    """An orthogonal matrix that maps the vector of ones to itself."""
    g = torch.Generator().manual_seed(seed)
    basis = torch.cat([torch.ones(hidden, 1), torch.randn(hidden, hidden - 1, generator=g)], 1)
    q, _ = torch.linalg.qr(basis.double())
    turn, _ = torch.linalg.qr(torch.randn(hidden - 1, hidden - 1, generator=g).double())
    inner = torch.eye(hidden, dtype=torch.float64)
    inner[1:, 1:] = turn
    return (q @ inner @ q.T).float()
