"""Grok-1, and others published with code of their own: a list of experts and a linear gate."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from moescope.models.families.feed_forward import is_feed_forward
from moescope.models.families.listed import ListedExperts
from moescope.models.families.rebuilt import RebuiltLayer


class ListedLayer(ListedExperts, RebuiltLayer):
    """`block.gate(x) -> logits`, `block.experts[e](x)`; the block chooses by itself.

    Weights are the softmax over all experts (fp32), of the `block.top_k` largest; they add up to
    one if the block says `norm_topk_prob`. What is called `shared_...` in the block is a shared
    expert. Whether all this holds, conformance proves.
    """

    @staticmethod
    def fits(block: nn.Module) -> bool:
        """Whether a module is built like this."""
        children = dict(block.named_children())
        experts = children.get("experts")
        return (
            isinstance(children.get("gate"), nn.Linear)
            and isinstance(experts, nn.ModuleList)
            and isinstance(getattr(block, "top_k", None), int)
            and all(is_feed_forward(expert) for expert in experts)
        )

    def router_logits(self, router_output: Any) -> Float[Tensor, "tokens experts"]:
        """What the gate returns, flat."""
        logits: Tensor = router_output
        return logits.reshape(-1, logits.shape[-1])

    def chosen(
        self, router_output: Any
    ) -> tuple[Int64[Tensor, "tokens top_k"], Float[Tensor, "tokens top_k"]]:
        """The experts with the largest logits, and their share of the softmax."""
        block: Any = self.block
        logits = self.router_logits(router_output)
        weights, experts = logits.softmax(-1, dtype=torch.float32).topk(block.top_k)
        if getattr(block, "norm_topk_prob", False):
            weights = weights / weights.sum(-1, keepdim=True)
        return experts, weights.to(logits)

    def block_output(
        self, output: Float[Tensor, "tokens hidden"], x: Tensor, router_output: Any
    ) -> Any:
        """In the shape of the input, beside the logits."""
        return output.view_as(x), router_output

    def expert_outputs(
        self, x: Float[Tensor, "tokens hidden"], experts: Sequence[int]
    ) -> Float[Tensor, "experts tokens hidden"]:
        """By calling the modules."""
        self.check_experts(experts)
        return torch.stack(
            [self.expert_module(expert)(x.to(self.router_weight)) for expert in experts]
        )

    def expert_module(self, expert: int) -> nn.Module:
        """The module of one expert."""
        return self.block.get_submodule(f"experts.{expert}")
