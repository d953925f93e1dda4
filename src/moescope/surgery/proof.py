"""The proof that a router still chooses what it chose, under the experts' new numbers."""

from contextlib import nullcontext

import torch
from jaxtyping import Float
from torch import Tensor

from moescope.errors import ModelError
from moescope.models.view import MoELayer

_PROBES = 256
_TOLERANCE = 1e-5
_TOLERANCE_HALF = 1e-2


class Proof:
    """What a layer says of random inputs while all experts but some are masked.

    Where experts cannot be masked (the bias by which some routers choose lies elsewhere), what it
    says without masks: of the experts that stay, and of the inputs for which it chooses no others.
    """

    def __init__(self, layer: MoELayer, experts: list[int]) -> None:
        self.layer = layer
        self.masked = True
        generator = torch.Generator().manual_seed(0)
        self.inputs = torch.randn(_PROBES, layer.hidden_size, generator=generator)
        rest = sorted(set(range(layer.num_experts)) - set(experts))
        try:
            with layer.masking(rest) if rest else nullcontext():
                logits, weights = self._said()
        except ModelError:
            self.masked = False
            logits, weights = self._said()
        self.logits, self.weights = logits[:, experts], weights[:, experts]
        self.comparable = (weights[:, rest] == 0).all(1)

    def require(self) -> None:
        """Compare with what the layer, changed meanwhile, says now.

        Raises:
            ModelError: It is something else.
        """
        logits, weights = self._said()
        now, before = weights[self.comparable], self.weights[self.comparable]
        if not self.masked:  # some weigh by a softmax over all experts
            now, before = (now > 0).float(), (before > 0).float()
        half = self.layer.router_weight.dtype.itemsize < torch.float32.itemsize
        tolerance = _TOLERANCE_HALF if half else _TOLERANCE
        errors = [_difference(now, before)]
        if not self.masked:
            errors.append(_difference(logits, self.logits))
        if not max(errors) <= tolerance or not self.comparable.any():
            raise ModelError(
                f"the router of layer {self.layer.index} does not follow its experts",
                got=f"a relative difference of {max(errors):.2g}",
                expected=f"at most {tolerance:g}",
            )

    def _said(self) -> tuple[Float[Tensor, "probes experts"], Float[Tensor, "probes experts"]]:
        """Logits, and the weight of every expert, 0 where it is not chosen."""
        routing = self.layer.route(self.inputs)
        weights = torch.zeros(_PROBES, self.layer.num_experts, device=routing.weights.device)
        weights.scatter_add_(1, routing.experts.clamp_min(0), routing.weights.float())
        return routing.logits.float()[:, : self.layer.num_experts], weights


def _difference(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm().clamp_min(torch.finfo(other.dtype).tiny))
