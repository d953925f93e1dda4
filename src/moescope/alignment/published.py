"""The loop of the MoE Align study, as published: a measure of ten optimiser steps."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from moescope.alignment.samples import Samples
from moescope.alignment.stack import AdapterStack, ExpertStack
from moescope.experts.weights import ExpertWeights

STEPS = 10
RATE = 1e-3
TOKENS = 5_000
"""Most tokens of a source expert that the study used."""


def initial_adapter(hidden: int, seed: int) -> tuple[Tensor, Tensor]:
    """Weight and bias of `nn.Linear(hidden, hidden)` right after `torch.manual_seed(seed)`.

    The global random state stays as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layer = nn.Linear(hidden, hidden)
    return layer.weight.detach(), layer.bias.detach()


def train_as_published(
    train: Samples, experts: Sequence[ExpertWeights], seed: int
) -> tuple[AdapterStack, Float[Tensor, " fits"]]:
    """Ten full-batch steps of Adam in fp32 for every target, all of one shape.

    Every fit starts from the same `nn.Linear` initialisation. At most the first 5,000 tokens are
    used.

    Returns:
        The adapters, and the number the study printed: the training error, averaged over tokens
        and dimensions, of the tenth forward pass.
    """
    x, y = train.inputs[:TOKENS], train.outputs[:TOKENS]
    targets = ExpertStack.of(experts, x.device)
    weight, bias = (
        start.to(x.device).expand(len(experts), *start.shape).clone()
        for start in initial_adapter(train.hidden_size, seed)
    )
    adapters = AdapterStack(weight, bias, torch.ones_like(bias), torch.zeros_like(bias))
    parameters = [p.requires_grad_() for p in adapters.parameters()]
    optimiser = torch.optim.Adam(parameters, lr=RATE)
    error = torch.zeros(len(experts))
    for _ in range(STEPS):
        optimiser.zero_grad()
        error = (targets(adapters(x)) - y).square().mean((1, 2))  # [fits]
        error.sum().backward()
        optimiser.step()
    return adapters, error.detach()
