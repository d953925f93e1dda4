"""The constant-output adapter: gain zero, only the shift trained. No fit may end above it."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from moescope.alignment.domains import Domain
from moescope.alignment.stack import AdapterStack, ExpertStack

_STEPS = 200
_CANDIDATES = 8


def constant_adapters(
    outputs: Float[Tensor, "tokens hidden"], experts: ExpertStack, domains: Sequence[Domain]
) -> AdapterStack:
    """For every target, the shift whose output is nearest to the mean of `outputs`.

    The squared error of a constant c is the variance plus |c - mean|^2, so only the mean counts.
    Adam from the mean of the target's inputs and seven of its inputs, half of them with steps as
    large as the inputs, half with steps as large as their spread, and from the same seven without
    the mean, for experts that are quiet where no inputs are; the best found is kept.

    Returns:
        Adapters of form "scale" whose gain is zero.
    """
    wanted = outputs.mean(0)
    unit = outputs.square().mean()
    shift = torch.stack([_candidates(domain) for domain in domains]).requires_grad_()
    reach = [(domain.scale, domain.inputs.square().mean().sqrt()) for domain in domains]
    scale = torch.stack([torch.stack(r) for r in reach]).repeat(1, _CANDIDATES)[:, :, None]
    first, second = torch.zeros_like(shift), torch.zeros_like(shift)
    for step in range(1, _STEPS + 1):
        error = (experts(shift) - wanted).square().sum() / unit
        (gradient,) = torch.autograd.grad(error, [shift])
        with torch.no_grad():
            first.lerp_(gradient, 0.1)
            second.lerp_(gradient.square(), 0.02)
            direction = (first / (1 - 0.9**step)) / (second / (1 - 0.98**step)).sqrt().add(1e-20)
            shift -= 0.1 * scale * 0.5 * (1 + math.cos(math.pi * step / _STEPS)) * direction
    with torch.no_grad():
        error = (experts(shift) - wanted).square().sum(-1)  # [fits, candidates]
        best = shift[torch.arange(len(shift)), error.argmin(1)]
    return AdapterStack(None, None, torch.zeros_like(best), best, form="scale")


def _candidates(domain: Domain) -> Float[Tensor, "candidates hidden"]:
    mean, inputs = domain.whitening.mean[None], domain.inputs
    every = max(1, len(inputs) // (_CANDIDATES - 1))
    chosen = inputs[::every][: _CANDIDATES - 1]
    missing = _CANDIDATES - 1 - len(chosen)
    near = torch.cat([mean, chosen, mean.expand(missing, -1)])
    return torch.cat([near, near - mean])
