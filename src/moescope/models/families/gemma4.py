"""Gemma 4: router and experts lie in the decoder layer and read the residual, normed twice."""

from collections.abc import Callable
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from moescope.errors import ModelError
from moescope.models.families.fused import FusedLayer
from moescope.models.families.registry import register
from moescope.models.offload import parameters
from moescope.models.patching import wrapped

_EXPERTS_NORM = "pre_feedforward_layernorm_2"


class _Routed(nn.Module):
    """The block that the model does not have: from what the experts are given to their sum.

    The router norms the residual without weights, the experts with weights, which are divided out.
    """

    def __init__(self, decoder_layer: nn.Module) -> None:
        super().__init__()
        self.router = decoder_layer.get_submodule("router")
        self.experts = decoder_layer.get_submodule("experts")
        self._norm = (decoder_layer.get_submodule(_EXPERTS_NORM),)  # no part of the block

    @property
    def norm_weight(self) -> Tensor:
        """Of the norm before the experts."""
        return parameters(self._norm[0])["weight"]

    def forward(self, x: Tensor) -> Any:
        """What the experts add up to."""
        rows = x.reshape(-1, x.shape[-1])
        with wrapped(self.router.get_submodule("norm"), lambda _: lambda normed: normed):
            _, weights, experts = self.router(rows / self.norm_weight.to(rows))
        return self.experts(rows, experts, weights).view_as(x)

    def register_forward_hook(self, hook: Callable[..., Any], **options: Any) -> RemovableHandle:
        """The model runs the experts."""
        return self.experts.register_forward_hook(hook, **options)


@register("Gemma4TextDecoderLayer")
class Gemma4Layer(FusedLayer):
    """The input is that of the experts; the output is their sum, before it is normed.

    A dense network beside them reads a third norm of the residual, and what it returns is normed
    before it is added: it is no shared expert.
    """

    def __init__(self, _: nn.Module, decoder_layer: nn.Module, **place: Any) -> None:
        if "experts" not in dict(decoder_layer.named_children()):
            raise ModelError(
                f"{place['family']} is a dense model here: its layers have no experts",
                got=f"a {type(decoder_layer).__name__} without experts",
                remedy="`load(..., dense_as_experts=True)` sees every feed-forward layer as one",
            )
        routed = _Routed(decoder_layer)
        super().__init__(routed, nn.ModuleList([decoder_layer, routed]), **place)

    @property
    def router(self) -> nn.Module:
        """`decoder_layer.router.proj`."""
        return self.block.get_submodule("router.proj")

    @property
    def router_weight(self) -> Float[Tensor, "experts hidden"]:
        """With what the router multiplies its norm by, and without what the experts do."""
        router: Any = self.block.get_submodule("router")
        block: Any = self.block
        own = parameters(router)["scale"].float() * router.scalar_root_size
        weight = self.router.get_parameter("weight").detach()
        effective: Tensor = weight * (own / block.norm_weight.float())
        return effective.to(weight)

    @property
    def num_experts(self) -> int:
        """From the shape of `proj`."""
        return self.router.get_parameter("weight").shape[0]

    @property
    def hidden_size(self) -> int:
        """From the shape of `proj`."""
        return self.router.get_parameter("weight").shape[1]

    @property
    def output_scale(self) -> float:
        """1: the block is what the experts return."""
        return 1.0

    def router_logits(self, router_output: Any) -> Float[Tensor, "tokens experts"]:
        """What `proj` returns."""
        logits: Tensor = router_output
        return logits
