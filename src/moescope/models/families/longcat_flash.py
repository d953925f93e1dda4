"""LongCat-Flash: the last experts are the identity, so that easy tokens take less computing."""

from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from moescope.experts.weights import ExpertWeights
from moescope.models.families.by_weights import named_nonlinearity
from moescope.models.families.fused import FusedLayer
from moescope.models.families.registry import register


@register("LongcatFlashMoE")
class LongcatFlashLayer(FusedLayer):
    """As usual; experts from number `len(down_proj)` on return their input.

    "Zero-computation experts" (Meituan LongCat Team 2025, arXiv 2509.01322, section 2.1).
    """

    @property
    def router_weight(self) -> Float[Tensor, "experts hidden"]:
        """`block.router.classifier.weight`, detached."""
        return self.router.get_parameter("classifier.weight").detach()

    @property
    def router_bias(self) -> Float[Tensor, " experts"] | None:
        """None: the router may hold one, but does not add it."""
        return None

    def experts_arguments(
        self,
        x: Float[Tensor, "tokens hidden"],
        experts: Int64[Tensor, "tokens top_k"],
        weights: Float[Tensor, "tokens top_k"],
    ) -> tuple[Any, ...]:
        """As usual; a lone expert is named twice, because the module fails at one per token."""
        if experts.shape[1] == 1:
            experts = experts.expand(-1, 2)
            weights = torch.cat([weights, torch.zeros_like(weights)], 1)
        return x, experts, weights

    def expert_weights(self, expert: int) -> ExpertWeights:
        """Views of the fused tensors; relu(x) - relu(-x) for the identity."""
        tensors = self.expert_tensors(expert)
        if not tensors:
            one = torch.eye(self.hidden_size, dtype=self._dtype, device=self._device)
            both = torch.cat([one, -one])
            return ExpertWeights(None, both, both.mT, activation="relu")
        gate, up = tensors["gate_up_proj"].chunk(2)
        act = named_nonlinearity(self.experts.get_submodule("act_fn"))
        return ExpertWeights(gate, up, tensors["down_proj"], activation=act)

    def expert_tensors(self, expert: int) -> dict[str, Tensor]:
        """Rows of the fused tensors; none for the identity, whose rows are never used."""
        self.check_experts([expert])
        if expert >= len(self.experts.get_parameter("down_proj")):
            return {}
        return super().expert_tensors(expert)
