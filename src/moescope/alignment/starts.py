"""Where a fit begins, by the form of its adapter.

The error is not convex in the adapter: a good start is most of the work.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import layer_norm

from moescope.alignment.domains import Domain
from moescope.alignment.linear_parts import SourceLinear
from moescope.alignment.randomness import generator
from moescope.alignment.samples import Samples
from moescope.alignment.stack import AdapterStack, ExpertStack
from moescope.alignment.transport import FEW, best_share, transported_start
from moescope.experts.adapter import Form


def start(
    form: Form,
    rank: int,
    train: Samples,
    source: SourceLinear | None,
    experts: ExpertStack,
    domains: Sequence[Domain],
) -> tuple[AdapterStack, dict[str, Tensor]]:
    """First adapters, and the units in which the optimiser moves each of their tensors.

    Args:
        form: Any but "identity".
        rank: Of the delta of "low_rank".
        train: Tokens of the source expert, inputs in the `coordinates` of the form.
        source: Its linear part, which the forms with a full matrix start from.
        experts: The targets.
        domains: Where the inputs of each lie.
    """
    if form in ("low_rank", "scale"):
        tensors, unit = matched_start(form, train, experts, domains)
        tensors["left"], tensors["right"] = no_delta(unit, rank)
        adapters = AdapterStack.holding(form, tensors)
        return adapters, units_of(adapters, unit)
    assert source is not None
    tensors, units = transported_start(form, train, source, experts, domains)
    adapters = AdapterStack.holding(form, tensors)
    return adapters, {name: units[name] for name in adapters.tensors()}


def no_delta(
    like: Float[Tensor, "fits hidden"], rank: int
) -> tuple[Float[Tensor, "fits hidden rank"], Float[Tensor, "fits rank hidden"]]:
    """Factors that add nothing yet: left zero, right random orthonormal rows, always the same.

    With both at zero there would be no gradient.
    """
    fits, hidden = like.shape
    source = generator(0, "rows of a low-rank delta", rank)
    rows = torch.linalg.qr(torch.randn(hidden, rank, generator=source, dtype=torch.float64))[0].T
    right = rows.float().to(like.device)
    return like.new_zeros(fits, hidden, len(right)), right.repeat(fits, 1, 1)


def matched_start(
    form: Form, train: Samples, experts: ExpertStack, domains: Sequence[Domain]
) -> tuple[dict[str, Tensor], Float[Tensor, "fits hidden"]]:
    """Every dimension with the mean of the target's inputs and the best share of their spread."""
    few = train.inputs[:FEW]
    shift = torch.stack([domain.whitening.mean for domain in domains])
    spread = torch.stack([domain.spread for domain in domains])
    normal = layer_norm(few, few.shape[-1:]) if form == "low_rank" else few
    share, _ = best_share(normal * spread[:, None], shift, experts, train)
    gain = share * spread
    return {
        "diagonal": torch.ones_like(shift),
        "bias": torch.zeros_like(shift),
        "gain": gain,
        "shift": shift.clone(),
    }, gain.clone()


def units_of(adapters: AdapterStack, unit: Float[Tensor, "fits #hidden"]) -> dict[str, Tensor]:
    """What the steps of each tensor are multiples of.

    That is `unit` where a tensor sets the size of the target's inputs, and one where it comes
    before the gain.
    """
    sizes = ("weight", "shift") if adapters.form == "linear" else ("gain", "shift")
    units = {}
    for name, tensor in adapters.tensors().items():
        chosen = unit if name in sizes else torch.ones_like(unit[:, :1])
        units[name] = chosen[:, :, None] if tensor.ndim == 3 else chosen
    return units
