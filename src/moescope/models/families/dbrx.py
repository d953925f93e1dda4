"""DBRX: the block chooses, and the experts lie one below the other in flat matrices."""

from typing import Any

from jaxtyping import Float, Int64
from torch import Tensor, nn

from moescope.experts.weights import ExpertWeights
from moescope.models.families.by_weights import ByWeightsLayer, named_nonlinearity
from moescope.models.families.registry import register


@register("DbrxFFN")
class DbrxLayer(ByWeightsLayer):
    """`router(x) -> logits`; `w1`, `v1`, `w2` are [experts * intermediate, hidden]."""

    @property
    def intermediate_size(self) -> int:
        """From the shape of `w1`."""
        return self._all.get_parameter("w1").shape[0] // self.num_experts

    def router_logits(self, router_output: Any) -> Float[Tensor, "tokens experts"]:
        """What the router returns."""
        logits: Tensor = router_output
        return logits

    def chosen(
        self, router_output: Any
    ) -> tuple[Int64[Tensor, "tokens top_k"], Float[Tensor, "tokens top_k"]]:
        """By asking the block."""
        block: Any = self.block
        weights, experts = block.route_tokens_to_experts(router_output)
        return experts, weights

    def block_output(
        self, output: Float[Tensor, "tokens hidden"], x: Tensor, router_output: Any
    ) -> Any:
        """In the shape of the input."""
        return output.view_as(x)

    def expert_weights(self, expert: int) -> ExpertWeights:
        """Views of the flat matrices, `w2` transposed."""
        tensors = self.expert_tensors(expert)
        act = named_nonlinearity(self._all.get_submodule("activation_fn"))
        return ExpertWeights(tensors["w1"], tensors["v1"], tensors["w2"].mT, activation=act)

    def expert_tensors(self, expert: int) -> dict[str, Tensor]:
        """Rows of the flat matrices."""
        self.check_experts([expert])
        wide = self.intermediate_size
        own = slice(expert * wide, (expert + 1) * wide)
        return {name: matrix.detach()[own] for name, matrix in self._all.named_parameters()}

    @property
    def _all(self) -> nn.Module:
        return self.block.get_submodule("experts.mlp")
