"""JetMoE: the router sorts tokens by expert; the block adds a bias."""

from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from moescope.experts.weights import ExpertWeights
from moescope.models.families.by_weights import ByWeightsLayer, named_nonlinearity
from moescope.models.families.registry import register


@register("JetMoeDecoderLayer")
class JetMoeLayer(ByWeightsLayer):
    """`router(x) -> (slots by expert, their tokens, their weights, tokens per expert, logits)`.

    The attention of the decoder layer has experts of its own, which are not seen; so that nobody
    looks for them, the whole decoder layer is registered.
    """

    def __init__(self, _: nn.Module, decoder_layer: nn.Module, **place: Any) -> None:
        super().__init__(decoder_layer.get_submodule("mlp"), decoder_layer, **place)

    @property
    def intermediate_size(self) -> int:
        """From the shape of `output_linear`."""
        return self.block.get_parameter("output_linear.weight").shape[2]

    @property
    def has_shared_expert(self) -> bool:
        """No: what every token is given is a bias."""
        return False

    def router_logits(self, router_output: Any) -> Float[Tensor, "tokens experts"]:
        """Last of what the router returns."""
        logits: Tensor = router_output[4]
        return logits

    def chosen(
        self, router_output: Any
    ) -> tuple[Int64[Tensor, "tokens top_k"], Float[Tensor, "tokens top_k"]]:
        """Every token's slots, sorted back."""
        router: Any = self.router
        slots, _, weights, sizes, _ = router_output
        numbers = torch.arange(self.num_experts, device=slots.device)
        experts = numbers.repeat_interleave(torch.tensor(sizes, device=slots.device))
        back = slots.argsort()
        return experts[back].view(-1, router.top_k), weights[back].view(-1, router.top_k)

    def block_output(
        self, output: Float[Tensor, "tokens hidden"], x: Tensor, router_output: Any
    ) -> Any:
        """In the shape of the input."""
        return output.view_as(x)

    def shared_output(
        self, x: Float[Tensor, "tokens hidden"]
    ) -> Float[Tensor, "tokens hidden"] | None:
        """The bias of the block, the same for every token."""
        return self.block.get_parameter("bias").expand(len(x), -1)

    def expert_weights(self, expert: int) -> ExpertWeights:
        """Views of the stacked matrices."""
        tensors = self.expert_tensors(expert)
        gate, up = tensors["input_linear"].chunk(2)
        act = named_nonlinearity(self.block.get_submodule("activation"))
        return ExpertWeights(gate, up, tensors["output_linear"], activation=act)

    def expert_tensors(self, expert: int) -> dict[str, Tensor]:
        """Rows of the stacked matrices."""
        self.check_experts([expert])
        return {
            name: self.block.get_parameter(f"{name}.weight").detach()[expert]
            for name in ("input_linear", "output_linear")
        }
