"""Grok-1, and others published with code of their own: a list of experts and a linear gate."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from moescope.experts.weights import ExpertWeights
from moescope.models.families.feed_forward import feed_forward_weights, is_feed_forward
from moescope.models.families.rebuilt import RebuiltLayer


class ListedLayer(RebuiltLayer):
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

    @property
    def router(self) -> nn.Module:
        """`block.gate`."""
        return self.block.get_submodule("gate")

    @property
    def router_weight(self) -> Float[Tensor, "experts hidden"]:
        """`block.gate.weight`, detached."""
        return self.router.get_parameter("weight").detach()

    @property
    def intermediate_size(self) -> int:
        """From the matrices of the first expert."""
        return self.expert_weights(0).intermediate_size

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
        return torch.stack([self._expert(expert)(x.to(self.router_weight)) for expert in experts])

    def expert_weights(self, expert: int) -> ExpertWeights:
        """Views of the matrices of one module."""
        self.check_experts([expert])
        return feed_forward_weights(self._expert(expert))

    def expert_tensors(self, expert: int) -> dict[str, Tensor]:
        """The parameters of one module."""
        self.check_experts([expert])
        named = self._expert(expert).named_parameters()
        return {name: parameter.detach() for name, parameter in named}

    def _expert(self, expert: int) -> nn.Module:
        return self.block.get_submodule(f"experts.{expert}")
