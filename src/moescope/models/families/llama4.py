"""Llama 4: the weight scales the input of the expert; every expert sees every token."""

from collections.abc import Sequence
from typing import Any

from jaxtyping import Float, Int64
from torch import Tensor, nn

from moescope.experts.weights import ExpertWeights
from moescope.models.families.gating import plain
from moescope.models.families.rebuilt import RebuiltLayer
from moescope.models.families.registry import register
from moescope.models.view import Function


@register("Llama4TextMoe")
class Llama4Layer(RebuiltLayer):
    """`router(x) -> (sigmoid(logits) of the chosen, 0 elsewhere, logits)`; `f(weight * x)`."""

    @property
    def router(self) -> nn.Module:
        """`block.router`."""
        return self.block.get_submodule("router")

    @property
    def router_weight(self) -> Float[Tensor, "experts hidden"]:
        """`block.router.weight`, detached."""
        return self.router.get_parameter("weight").detach()

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

    def weigh(
        self,
        function: Function,
        x: Float[Tensor, "tokens hidden"],
        weights: Float[Tensor, " tokens"],
    ) -> Float[Tensor, "tokens hidden"]:
        """`function(weight * x)`."""
        return function(x * weights[:, None])

    def block_output(
        self, output: Float[Tensor, "tokens hidden"], x: Tensor, router_output: Any
    ) -> Any:
        """Flat, beside the logits."""
        return output, self.router_logits(router_output)

    def expert_outputs(
        self, x: Float[Tensor, "tokens hidden"], experts: Sequence[int]
    ) -> Float[Tensor, "experts tokens hidden"]:
        """From the tensors: the experts module would run all experts."""
        weights = [self.expert_weights(expert) for expert in experts]
        x = x.to(self._tensors["down_proj"])
        outputs = x.new_empty(len(experts), *x.shape)
        for row, expert in enumerate(weights):
            outputs[row] = expert(x)
        return outputs

    def expert_weights(self, expert: int) -> ExpertWeights:
        """Views of the fused tensors, which are transposed."""
        tensors = self.expert_tensors(expert)
        gate, up = tensors["gate_up_proj"].mT.chunk(2)
        activation = plain(self.block.get_submodule("experts")).activation
        return ExpertWeights(gate, up, tensors["down_proj"].mT, activation=activation)

    def expert_tensors(self, expert: int) -> dict[str, Tensor]:
        """Rows of the fused tensors."""
        self.check_experts([expert])
        return {name: tensor[expert] for name, tensor in self._tensors.items()}
