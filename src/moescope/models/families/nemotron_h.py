"""Nemotron-H: experts without gates, which may work in a space smaller than the model."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn.functional import linear

from moescope.experts.weights import ExpertWeights
from moescope.models.families.by_weights import named_nonlinearity
from moescope.models.families.rebuilt import RebuiltLayer
from moescope.models.families.registry import register
from moescope.models.families.shared import shared_experts


@register("NemotronHMoE")
class NemotronHLayer(RebuiltLayer):
    """`fc2_latent_proj(experts(fc1_latent_proj(x), experts, weights)) + shared_experts(x)`.

    An expert is seen as what it does to the model: with both projections, of which the bias of
    the second belongs to no expert.
    """

    @property
    def intermediate_size(self) -> int:
        """From the shape of `down_proj`."""
        return self._experts.get_parameter("down_proj").shape[2]

    @property
    def has_shared_expert(self) -> bool:
        """Always."""
        return True

    def router_logits(self, router_output: Any) -> Float[Tensor, "tokens experts"]:
        """First of what the router returns."""
        logits: Tensor = router_output[0]
        return logits

    def chosen(
        self, router_output: Any
    ) -> tuple[Int64[Tensor, "tokens top_k"], Float[Tensor, "tokens top_k"]]:
        """Third and second of what the router returns."""
        _, weights, experts = router_output
        return experts, weights

    def block_output(
        self, output: Float[Tensor, "tokens hidden"], x: Tensor, router_output: Any
    ) -> Any:
        """In the shape of the input."""
        return output.view_as(x)

    def shared_output(
        self, x: Float[Tensor, "tokens hidden"]
    ) -> Float[Tensor, "tokens hidden"] | None:
        """The shared expert, and the bias behind the experts if there is one."""
        output = shared_experts(self.block, x)
        _, bias = self._projection("fc2_latent_proj")
        return output if output is None or bias is None else output + bias

    def expert_outputs(
        self, x: Float[Tensor, "tokens hidden"], experts: Sequence[int]
    ) -> Float[Tensor, "experts tokens hidden"]:
        """By calling the experts module with one expert and weight 1, between the projections."""
        self.check_experts(experts)
        x = x.to(self._experts.get_parameter("down_proj"))
        narrow = self.block.get_submodule("fc1_latent_proj")(x)
        back, _ = self._projection("fc2_latent_proj")
        outputs = x.new_empty(len(experts), *x.shape)
        for row, expert in enumerate(experts):
            chosen = torch.full((len(x), 1), expert, device=x.device)
            output: Tensor = self._experts(narrow, chosen, x.new_ones(len(x), 1))
            outputs[row] = output if back is None else linear(output, back)
        return outputs

    def expert_weights(self, expert: int) -> ExpertWeights:
        """Views of the fused tensors, or their products with the projections."""
        tensors = self.expert_tensors(expert)
        up, down = tensors["up_proj"], tensors["down_proj"]
        there, bias = self._projection("fc1_latent_proj")
        back, _ = self._projection("fc2_latent_proj")
        return ExpertWeights(
            None,
            up if there is None else up @ there,
            down if back is None else back @ down,
            activation=named_nonlinearity(self._experts.get_submodule("act_fn")),
            up_bias=None if bias is None else up @ bias,
        )

    def expert_tensors(self, expert: int) -> dict[str, Tensor]:
        """Rows of the fused tensors; the projections belong to all experts."""
        self.check_experts([expert])
        return {name: tensor.detach()[expert] for name, tensor in self._experts.named_parameters()}

    @property
    def _experts(self) -> nn.Module:
        return self.block.get_submodule("experts")

    def _projection(self, name: str) -> tuple[Tensor | None, Tensor | None]:
        """Weight and bias of a projection, detached; None where it is the identity."""
        tensors = dict(self.block.get_submodule(name).named_parameters())
        weight, bias = (tensors.get(part) for part in ("weight", "bias"))
        return None if weight is None else weight.detach(), None if bias is None else bias.detach()
