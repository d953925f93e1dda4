"""NLLB-MoE: two experts per token as far as their capacity goes, in encoder and decoder."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn.functional import one_hot

from moescope.errors import ConformanceError, ModelError
from moescope.models.families.listed import ListedExperts
from moescope.models.families.probing import arguments_given
from moescope.models.families.rebuilt import RebuiltLayer
from moescope.models.families.registry import register
from moescope.models.offload import resident


@register("NllbMoeSparseMLP")
class NllbMoeLayer(ListedExperts, RebuiltLayer):
    """`router(x) -> (mask, weights [tokens, experts], logits)`, what the paper says they mean.

    Every token goes to the two experts with the largest shares, weighted by their parts of the
    sum of both. Expert output masking leaves, on average, 1 - `moe_token_dropout` of the outputs
    (Costa-jussa et al. 2022, arXiv 2207.04672).

    Raises:
        ConformanceError: The block does not run the experts that its router chooses.
    """

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        experts, last = self.block.get_submodule("experts"), self.num_experts - 1
        with resident(self.router):
            token = self.router_weight.new_zeros(1, self.hidden_size)
        mask = one_hot(torch.tensor([last], device=token.device), self.num_experts)
        try:
            arguments_given(self.expert_module(last), lambda: experts(token, mask, mask.to(token)))
        except ModelError as error:
            raise ConformanceError(
                "this version of transformers takes the mask of chosen experts in NLLB-MoE for "
                "their numbers, so that only experts 0 and 1 ever run",
                got=f"expert {last} of {self.stack} layer {self.index} is chosen and does not run",
                remedy="The model loads once NllbMoeExperts of transformers is mended",
            ) from error

    def router_logits(self, router_output: Any) -> Float[Tensor, "tokens experts"]:
        """Third of what the router returns."""
        logits: Tensor = router_output[2]
        return logits

    def chosen(
        self, router_output: Any
    ) -> tuple[Int64[Tensor, "tokens top_k"], Float[Tensor, "tokens top_k"]]:
        """The experts with weights above 0."""
        experts_module: Any = self.block.get_submodule("experts")
        weights, experts = router_output[1].topk(2)
        kept = 1 - experts_module.moe_token_dropout
        return experts.masked_fill(weights == 0, -1), weights * kept

    def block_output(
        self, output: Float[Tensor, "tokens hidden"], x: Tensor, router_output: Any
    ) -> Any:
        """In the shape of the input."""
        return output.view_as(x)

    def expert_outputs(
        self, x: Float[Tensor, "tokens hidden"], experts: Sequence[int]
    ) -> Float[Tensor, "experts tokens hidden"]:
        """By calling the modules."""
        self.check_experts(experts)
        x = x.to(self.expert_tensors(0)["fc1.weight"])
        return torch.stack([self.expert_module(expert)(x) for expert in experts])

    def expert_module(self, expert: int) -> nn.Module:
        """The module of one expert."""
        return self.block.get_submodule(f"experts.expert_{expert}")
