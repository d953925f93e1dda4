"""Llama 4: the weight scales the input of the expert; every expert sees every token."""

from typing import Any

from jaxtyping import Float, Int64
from torch import Tensor

from moescope.experts.weights import ExpertWeights
from moescope.models.families.by_weights import ByWeightsLayer, named_nonlinearity
from moescope.models.families.registry import register


@register("Llama4TextMoe")
class Llama4Layer(ByWeightsLayer):
    """`router(x) -> (sigmoid(logits) of the chosen, 0 elsewhere, logits)`; `f(weight * x)`."""

    weighs_inputs = True

    @property
    def intermediate_size(self) -> int:
        """From the shape of `down_proj`."""
        return self._tensors["down_proj"].shape[1]

    @property
    def _tensors(self) -> dict[str, Tensor]:
        parameters = self.block.get_submodule("experts").named_parameters()
        return {name: tensor.detach() for name, tensor in parameters}

    def router_logits(self, router_output: Any) -> Float[Tensor, "tokens experts"]:
        """Second of what the router returns."""
        logits: Tensor = router_output[1]
        return logits

    def chosen(
        self, router_output: Any
    ) -> tuple[Int64[Tensor, "tokens top_k"], Float[Tensor, "tokens top_k"]]:
        """The experts with the largest logits, and their sigmoids."""
        router: Any = self.router
        scores, logits = router_output
        experts = logits.topk(router.top_k, dim=1).indices
        return experts, scores.gather(1, experts)

    def block_output(
        self, output: Float[Tensor, "tokens hidden"], x: Tensor, router_output: Any
    ) -> Any:
        """Flat, beside the logits."""
        return output, self.router_logits(router_output)

    def expert_weights(self, expert: int) -> ExpertWeights:
        """Views of the fused tensors, which are transposed."""
        tensors = self.expert_tensors(expert)
        gate, up = tensors["gate_up_proj"].mT.chunk(2)
        act = named_nonlinearity(self.block.get_submodule("experts.act_fn"))
        return ExpertWeights(gate, up, tensors["down_proj"].mT, activation=act)

    def expert_tensors(self, expert: int) -> dict[str, Tensor]:
        """Rows of the fused tensors."""
        self.check_experts([expert])
        return {name: tensor[expert] for name, tensor in self._tensors.items()}
