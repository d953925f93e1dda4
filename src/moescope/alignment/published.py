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

    The global random state is not touched: fits run in several threads.
    """
    random = torch.Generator().manual_seed(seed)
    weight = nn.init.kaiming_uniform_(torch.empty(hidden, hidden), a=5**0.5, generator=random)
    bound = hidden**-0.5
    return weight, torch.empty(hidden).uniform_(-bound, bound, generator=random)


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
    first = [torch.zeros_like(p) for p in parameters]
    second = [torch.zeros_like(p) for p in parameters]
    error = torch.zeros(len(experts))
    for step in range(1, STEPS + 1):
        error = (targets(adapters(x)) - y).square().mean((1, 2))  # [fits]
        gradients = torch.autograd.grad(error.sum(), parameters)
        with torch.no_grad():  # Adam with PyTorch's defaults
            for p, g, m, v in zip(parameters, gradients, first, second, strict=True):
                m.lerp_(g, 1 - 0.9)
                v.mul_(0.999).addcmul_(g, g, value=1 - 0.999)
                size = (v / (1 - 0.999**step)).sqrt_().add_(1e-8)
                p.addcdiv_(m, size, value=-RATE / (1 - 0.9**step))
    return adapters, error.detach()
