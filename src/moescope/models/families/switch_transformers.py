"""Switch Transformers: one expert per token, as far as its capacity goes; encoder and decoder."""

from collections.abc import Sequence
from typing import Any

from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn.functional import one_hot

from moescope.models.families.fused import FusedLayer
from moescope.models.families.linear_router import linear_map
from moescope.models.families.listed import ListedExperts
from moescope.models.families.registry import register
from moescope.models.view import Routing


@register("SwitchTransformersSparseMLP")
class SwitchLayer(ListedExperts, FusedLayer):
    """`router(x) -> (one-hot choice, weight, logits)`, `experts(x, one-hot choice, weight)`.

    An expert takes the first `expert_capacity` tokens of every row that choose it; the others go
    to none, so that the block adds nothing to them (Fedus et al. 2021, arXiv 2101.03961).
    """

    @property
    def _router_map(self) -> tuple[Tensor, Tensor | None]:
        return linear_map(self.router)

    @property
    def output_scale(self) -> float:
        """1: the block returns what the experts return."""
        return 1.0

    def router_logits(self, router_output: Any) -> Float[Tensor, "tokens experts"]:
        """Third of what the router returns, flat."""
        logits: Tensor = router_output[2]
        return logits.flatten(0, -2)

    def used_routing(
        self, experts_arguments: tuple[Any, ...]
    ) -> tuple[Int64[Tensor, "tokens top_k"], Float[Tensor, "tokens top_k"]]:
        """Where the ones are; none, and weight 0, for tokens that found no capacity."""
        _, chosen, weights = experts_arguments
        nowhere = chosen.sum(-1) == 0
        return chosen.argmax(-1).masked_fill(nowhere, -1), weights.masked_fill(nowhere, 0)

    def experts_arguments(
        self,
        x: Float[Tensor, "tokens hidden"],
        experts: Int64[Tensor, "tokens top_k"],
        weights: Float[Tensor, "tokens top_k"],
    ) -> tuple[Any, ...]:
        """One-hot choices, nothing for -1."""
        chosen = one_hot(experts.clamp_min(0), self.num_experts)
        return x, chosen.masked_fill((experts < 0)[..., None], 0), weights

    def route(self, x: Float[Tensor, "tokens hidden"]) -> Routing:
        """What the router returns for `x`."""
        output = self.router(x.to(self.expert_weights(0).up)[None])
        chosen, weights, _ = (tensor.transpose(0, 1) for tensor in output)  # one token a row
        experts, weights = self.used_routing((x, chosen, weights[:, :, 0]))
        for change in self._changes:
            experts, weights = change(experts, weights)
        return Routing(logits=self.router_logits(output), weights=weights, experts=experts)

    def expert_outputs(
        self, x: Float[Tensor, "tokens hidden"], experts: Sequence[int]
    ) -> Float[Tensor, "experts tokens hidden"]:
        """By calling the modules."""
        self.check_experts(experts)
        x = x.to(self.expert_weights(0).up)
        outputs = x.new_empty(len(experts), *x.shape)
        for row, expert in enumerate(experts):
            outputs[row] = self.expert_module(expert)(x)
        return outputs

    def expert_module(self, expert: int) -> nn.Module:
        """The module of one expert."""
        return self.experts.get_submodule(f"expert_{expert}")
