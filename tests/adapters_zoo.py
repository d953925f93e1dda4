"""Pairs of experts of which one is the other behind a known adapter."""

from dataclasses import dataclass

import torch

from alignment_zoo import documents, expert, normalised
from moescope.alignment.controls import rotation_for
from moescope.alignment.samples import Samples
from moescope.experts.adapter import Adapter
from moescope.experts.weights import ExpertWeights


@dataclass(frozen=True)
class Planted:
    """`target(adapter(x)) = source(x)` on all of `tokens`."""

    source: ExpertWeights
    target: ExpertWeights
    adapter: Adapter
    tokens: Samples

    def __post_init__(self):
        given = self.target(self.adapter(self.tokens.inputs))
        torch.testing.assert_close(given, self.tokens.outputs, atol=5e-3, rtol=1e-3)

    def parts(self, train=0.6, inner=0.1):
        """Training, inner and held-out tokens, of other documents."""
        of = self.tokens.documents / (1 + self.tokens.documents.max())
        first, second = of < train, (of >= train) & (of < train + inner)
        return tuple(self.tokens.where(m) for m in (first, second, ~(first | second)))


def random_adapter(form, hidden=16, rank=2, seed=0):
    """An adapter of a form, none of whose tensors is zero or one."""
    g = torch.Generator().manual_seed(seed)

    def around_one(*shape):
        return torch.exp(0.4 * torch.randn(*shape, generator=g))

    tensors = {
        "weight": torch.eye(hidden) + 0.8 * rotation_for(hidden, seed, "weight"),
        "bias": 0.3 * torch.randn(hidden, generator=g),
        "gain": around_one(hidden),
        "shift": torch.randn(hidden, generator=g),
    }
    if form == "orthogonal":
        tensors |= {"weight": rotation_for(hidden, seed, "orthogonal"), "gain": around_one(1)}
    if form == "low_rank":
        tensors["diagonal"] = around_one(hidden)
        tensors["left"] = torch.randn(hidden, rank, generator=g) / (4 * rank) ** 0.5
        tensors["right"] = torch.randn(rank, hidden, generator=g)
    absent = {
        "layer_norm": (),
        "linear": ("bias", "gain"),
        "orthogonal": ("bias",),
        "low_rank": ("weight",),
        "scale": ("weight", "bias"),
        "identity": ("weight", "bias", "gain", "shift"),
    }[form]
    return Adapter(**{n: t for n, t in tensors.items() if n not in absent}, form=form)


def planted(form, hidden=16, wide=24, rank=2, tokens=2_000, seed=0):
    """A target that is the source behind an adapter of exactly this form.

    Behind LayerNorm that takes inputs which the matrix carries to where LayerNorm changes nothing.
    """
    adapter = random_adapter(form, hidden, rank, seed)
    source, x = expert(hidden, wide, seed=seed + 1), normalised(tokens, hidden, seed=seed)
    eye = torch.eye(hidden)
    matrix, offset = eye, torch.zeros(hidden)
    if adapter.bias is not None:
        mixing = adapter.weight
        if form == "low_rank":
            mixing = torch.diag(adapter.diagonal) + adapter.left @ adapter.right
        x = torch.linalg.solve(mixing.double(), (x - adapter.bias).double().T).T.float()
        matrix = adapter.gain[:, None] * mixing
        offset = adapter.gain * adapter.bias + adapter.shift
    elif form != "identity":
        matrix = eye if adapter.weight is None else adapter.weight
        matrix = matrix if adapter.gain is None else matrix * adapter.gain[:, None]
        offset = adapter.shift
    back = torch.linalg.inv(matrix.double()).float()
    gate, up = source.gate @ back, source.up @ back
    target = ExpertWeights(gate, up, source.down, gate_bias=-gate @ offset, up_bias=-up @ offset)
    return Planted(source, target, adapter, Samples(x, source(x), documents(tokens, 100)))
