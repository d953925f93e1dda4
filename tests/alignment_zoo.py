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


def permutation(hidden=16, seed=0):
    """A permutation matrix: like a rotation that keeps the mean, it commutes with LayerNorm."""
    g = torch.Generator().manual_seed(seed)
    return torch.eye(hidden)[torch.randperm(hidden, generator=g)]


def outlier_norm(hidden=16, seed=0):
    """Gain and shift of a LayerNorm with two dimensions a hundred times as large as the others."""
    g = torch.Generator().manual_seed(seed)
    gain = torch.ones(hidden)
    gain[torch.randperm(hidden, generator=g)[:2]] = 100.0
    return gain, gain * torch.randn(hidden, generator=g)


def reading(source, gain, shift):
    """The expert that does on `gain * n + shift` what `source` does on n."""
    gate, up = source.gate / gain, source.up / gain
    return ExpertWeights(gate, up, source.down, gate_bias=-gate @ shift, up_bias=-up @ shift)


def ill_conditioned(tokens=1_200, hidden=16, seed=0, law=0):
    """Inputs as LayerNorm leaves them: spreads from 1.6 to 0.1, and an offset.

    `law` chooses directions and offset, `seed` the tokens.
    """
    g, of_law = (torch.Generator().manual_seed(number) for number in (seed, law))
    turn, _ = torch.linalg.qr(torch.randn(hidden, hidden, generator=of_law))
    offset = 0.5 * torch.randn(hidden, generator=of_law)
    scale = torch.logspace(0.2, -1.0, hidden)
    return layer_norm(torch.randn(tokens, hidden, generator=g) * scale @ turn + offset, (hidden,))


def nested_experts(hidden=16, wide=8, seed=0):
    """An expert, and one that has its neurons and as many more, on normalised inputs.

    The neurons of the first read the first half of the dimensions and write into `wide` of them;
    the others read the second half and write elsewhere. So the first is the second behind a gain of
    zero on the second half, and never the other way around: it cannot write what the others do.
    """
    g = torch.Generator().manual_seed(seed)
    half = torch.arange(hidden) < hidden // 2
    gate, up = (torch.randn(2 * wide, hidden, generator=g) * 0.5 for _ in range(2))
    reads = torch.cat([half.expand(wide, -1), ~half.expand(wide, -1)])
    down, _ = torch.linalg.qr(torch.randn(hidden, hidden, generator=g))
    size = torch.cat([torch.full((wide,), 0.6), torch.ones(wide)])
    large = ExpertWeights(gate * reads, up * reads, down[:, : 2 * wide] * size)
    small = ExpertWeights(large.gate[:wide], large.up[:wide], large.down[:, :wide].contiguous())
    return small, large


def trained_expert(hidden=16, wide=8, seed=0):
    """An expert fitted to a function of six directions, far from linear."""
    g = torch.Generator().manual_seed(seed)
    x = normalised(1_000, hidden, seed)
    inner, outer = (torch.randn(*s, generator=g) for s in ((hidden, 6), (6, hidden)))
    wanted = torch.cos(x @ inner) @ outer
    start = expert(hidden, wide, seed)
    parts = [p.requires_grad_() for p in (start.gate, start.up, start.down)]
    optimiser = torch.optim.Adam(parts, lr=0.02)
    for _ in range(200):
        optimiser.zero_grad()
        (ExpertWeights(*parts)(x) - wanted).square().mean().backward()
        optimiser.step()
    return ExpertWeights(*(p.detach() for p in parts))
