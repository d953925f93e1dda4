"""One view over every family of mixture-of-experts models."""

import hashlib
import html
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Int, Int64
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moescope.errors import ModelError, OptionError
from moescope.experts.weights import ExpertWeights
from moescope.models.offload import input_device, plain, state
from moescope.models.patching import masked_choice

Stack = Literal["decoder", "encoder"]

# What a configuration says about where and by what it was saved, not about the model.
_NOT_THE_MODEL = ("_name_or_path", "architectures", "dtype", "transformers_version")
_SAMPLED_VALUES = 4096


@dataclass(frozen=True, eq=False)
class Routing:
    """What the router of one layer said and what the layer did with it."""

    logits: Float[Tensor, "tokens experts"]
    """Router logits before any softmax, sigmoid, bias, or group limit."""
    weights: Float[Tensor, "tokens top_k"]
    """Weights with which the outputs of the chosen experts were added."""
    experts: Int64[Tensor, "tokens top_k"]
    """The experts that were used, not sorted; -1, with weight 0, where a slot was not used
    because the expert had no capacity left."""


Function = Callable[[Float[Tensor, "tokens hidden"]], Float[Tensor, "tokens hidden"]]
"""What an expert computes."""
Replacement = Callable[[Function, Float[Tensor, "tokens hidden"]], Float[Tensor, "tokens hidden"]]
"""What it computes instead, given what it computed before and its inputs."""
Rerouting = Callable[
    [Int64[Tensor, "tokens top_k"], Float[Tensor, "tokens top_k"]],
    tuple[Int64[Tensor, "tokens top_k"], Float[Tensor, "tokens top_k"]],
]
"""Other experts and weights than those the router chose."""


class MoELayer(ABC):
    """One sparse block of a model: a router, its experts and, in some families, a shared expert.

    `moescope.models.families.fused` sees all families that follow the common pattern; the others
    are subclasses that register themselves (`moescope.models.families.registry`). Tensors are
    flat: one row per token.
    """

    shared_in_block: ClassVar[bool] = True
    """Whether the output of the block holds that of the shared expert."""
    weighs_inputs: ClassVar[bool] = False
    """Whether weights scale what goes into an expert, not what comes out of it."""

    def __init__(
        self,
        block: nn.Module,
        decoder_layer: nn.Module,
        *,
        index: int,
        stack: Stack = "decoder",
        family: str = "",
    ) -> None:
        self.block = block
        self.decoder_layer = decoder_layer
        self.index = index
        self.stack: Stack = stack
        self.family = family
        """As in `config.model_type`."""

    @property
    @abstractmethod
    def router(self) -> nn.Module:
        """The module whose output carries the router logits."""

    @property
    @abstractmethod
    def router_weight(self) -> Float[Tensor, "experts hidden"]:
        """Matrix that turns inputs of the block into router logits."""

    @property
    def router_bias(self) -> Float[Tensor, " experts"] | None:
        """What is added to the logits, in the few families that do."""
        return None

    @property
    def top_k(self) -> int:
        """Number of experts per token."""
        return self.route(self.router_weight.new_zeros(1, self.hidden_size)).experts.shape[1]

    @property
    @abstractmethod
    def intermediate_size(self) -> int:
        """Number of neurons of one routed expert."""

    @abstractmethod
    def router_logits(self, router_output: Any) -> Float[Tensor, "tokens experts"]:
        """The logits within what the router module returned."""

    @abstractmethod
    def on_routing(self, seen: Callable[[Tensor, Tensor], None]) -> AbstractContextManager[None]:
        """Have `seen` called with the experts and weights that every forward pass uses."""

    @abstractmethod
    def route(self, x: Float[Tensor, "tokens hidden"]) -> Routing:
        """Routing of inputs of the block, as one row of tokens where capacity limits it."""

    @abstractmethod
    def expert_outputs(
        self, x: Float[Tensor, "tokens hidden"], experts: Sequence[int]
    ) -> Float[Tensor, "experts tokens hidden"]:
        """Unweighted output of each of `experts` for every input, whoever is routed there.

        Computed on the device and in the dtype of the weights, from the parameters as they are now:
        what `replacing` has in the place of an expert is not asked.

        Raises:
            OptionError: There is no such expert.
        """

    @abstractmethod
    def shared_output(
        self, x: Float[Tensor, "tokens hidden"]
    ) -> Float[Tensor, "tokens hidden"] | None:
        """What the shared expert adds to the output, its own gate included; None without one."""

    @abstractmethod
    def expert_weights(self, expert: int) -> ExpertWeights:
        """One routed expert as tensors, detached; views of the weights where these allow it.

        Raises:
            OptionError: There is no such expert.
            ModelError: The weights are not plain numbers (quantised), or not of this form.
        """

    @abstractmethod
    def expert_tensors(self, expert: int) -> dict[str, Tensor]:
        """The parameters of one routed expert by name: views, so that writing changes the model.

        Raises:
            OptionError: There is no such expert.
            ModelError: The weights are not plain numbers in memory (quantised, offloaded).
        """

    @abstractmethod
    def replacing(self, expert: int, function: Replacement) -> AbstractContextManager[None]:
        """Have `function` compute the outputs of one expert, for the tokens routed to it.

        Routing is seen as before. Contexts nest: the inner one gets the outer one as what the
        expert computed before.

        Raises:
            OptionError: There is no such expert.
        """

    @abstractmethod
    def rerouting(self, change: Rerouting) -> AbstractContextManager[None]:
        """Have other experts and weights used than the router chose; they are what is observed."""

    @contextmanager
    def masking(self, experts: Sequence[int]) -> Iterator[None]:
        """Have the router choose as if `experts` did not exist.

        Raises:
            OptionError: There is no such expert, or too few would be left to choose from.
            ModelError: The router chose one of them all the same.
        """
        self.check_experts(experts)
        masked = sorted(set(experts))
        if self.num_experts - len(masked) < self.top_k:
            raise OptionError(
                f"layer {self.index} chooses {self.top_k} experts per token",
                got=f"{len(masked)} of {self.num_experts} masked",
                expected=f"at most {self.num_experts - self.top_k}",
            )

        def refuse(chosen: Tensor, _: Tensor) -> None:
            if torch.isin(chosen, torch.tensor(masked, device=chosen.device)).any():
                raise ModelError(
                    f"the router of layer {self.index} chose a masked expert",
                    got=f"{masked} masked",
                    remedy="Its groups leave it no other choice: mask fewer experts of a group",
                )

        with (
            masked_choice(self.block, self.router, self.num_experts, masked),
            self.on_routing(refuse),
        ):
            yield

    def weigh(
        self,
        function: Function,
        x: Float[Tensor, "tokens hidden"],
        weights: Float[Tensor, " tokens"],
    ) -> Float[Tensor, "tokens hidden"]:
        """What an expert that computes `function` adds to the output of the block."""
        if self.weighs_inputs:
            return function(x * weights[:, None])
        return weights[:, None] * function(x)

    @property
    def num_experts(self) -> int:
        """Number of routed experts."""
        return self.router_weight.shape[0]

    @property
    def hidden_size(self) -> int:
        """Width of inputs and outputs of the block."""
        return self.router_weight.shape[1]

    @property
    def has_shared_expert(self) -> bool:
        """Whether every token also goes through an expert that is not routed."""
        nothing = self.router_weight.new_zeros(0, self.hidden_size)
        return self.shared_output(nothing) is not None

    def check_experts(self, experts: Sequence[int]) -> None:
        """Refuse numbers that are no experts of this layer.

        Raises:
            OptionError: There is no such expert.
        """
        for expert in experts:
            if not 0 <= expert < self.num_experts:
                raise OptionError(
                    f"layer {self.index} has no such expert",
                    got=expert,
                    expected=f"0 to {self.num_experts - 1}",
                )

    def __repr__(self) -> str:
        return (
            f"MoELayer({self.stack} {self.index}, {self.family}, {self.num_experts} experts, "
            f"top-{self.top_k}, hidden {self.hidden_size}, intermediate {self.intermediate_size})"
        )


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class MoEModel:
    """A loaded model, its tokenizer, and its mixture-of-experts layers."""

    model: PreTrainedModel
    """The model itself, in evaluation mode."""
    tokenizer: PreTrainedTokenizerBase | None
    """None where there is none beside the weights."""
    layers: list[MoELayer]
    """The mixture-of-experts layers in the order of the forward pass."""
    name: str
    """What was loaded: Hub id, folder, or name of a reference model; "in memory" otherwise."""
    revision: str | None = None
    """Commit on the Hub."""

    def layer(self, index: int, stack: Stack = "decoder") -> MoELayer:
        """The mixture-of-experts layer with the model's own layer number `index`.

        Raises:
            OptionError: That layer is dense or does not exist.
        """
        for layer in self.layers:
            if (layer.stack, layer.index) == (stack, index):
                return layer
        raise OptionError(
            f"{stack} layer {index} of the model {self.name!r} is not a mixture-of-experts layer",
            expected=f"one of {_ranges([la.index for la in self.layers if la.stack == stack])}",
        )

    def forward(
        self,
        input_ids: Int[Tensor, "rows length"],
        attention_mask: Int[Tensor, "rows length"] | None = None,
        *,
        head: bool = False,
    ) -> Any:
        """One forward pass without cache; an encoder-decoder model decodes what it encodes.

        Args:
            input_ids: Token ids, on any device.
            attention_mask: 1 at tokens that count; all by default.
            head: Whether the language-model head runs too; without it there are no logits.

        Raises:
            ModelError: There are more tokens in a row than the model was made for.
        """
        self._require_short(input_ids.shape[1])
        inputs: dict[str, Any] = {"input_ids": input_ids.to(self.device)}
        if attention_mask is not None:
            inputs["attention_mask"] = attention_mask.to(self.device)
        if self.model.config.is_encoder_decoder:
            inputs |= {f"decoder_{name}": tensor for name, tensor in inputs.items()}
        network: Any = self.model if head else self.model.base_model
        return network(**inputs, use_cache=False)

    def _require_short(self, tokens: int) -> None:
        if self.context_length is not None and tokens > self.context_length:
            raise ModelError(
                f"more tokens at once than {self.name!r} was made to read",
                got=f"{tokens:,}",
                expected=f"at most {self.context_length:,}",
                remedy="Take shorter rows (`packing.length`) or a shorter prompt",
            )

    @property
    def context_length(self) -> int | None:
        """Most tokens that it was made to read at once; None where its configuration has none."""
        # Some families have no end: the positions of T5 are relative.
        config = self.model.config.get_text_config()
        length: int | None = getattr(config, "max_position_embeddings", None)
        return length

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Evaluation mode, for as long as the context lasts."""
        training = self.model.training
        self.model.train(mode=False)
        try:
            yield
        finally:
            self.model.train(mode=training)

    @property
    def device(self) -> torch.device:
        """Where inputs go."""
        return input_device(self.model)

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        dtype: torch.dtype = self.model.dtype
        return dtype

    @property
    def fingerprint(self) -> str:
        """Identity of the model as it is now: SHA-256 of configuration and weights.

        Router weights count in full, of every other tensor an even sample of about 4,096 values.
        """
        digest = hashlib.sha256()
        config = _about_the_model(self.model.config.to_dict())
        digest.update(json.dumps(config, sort_keys=True, default=str).encode())
        for layer in self.layers:
            digest.update(_raw(layer.router_weight))
        for name, tensor in state(self.model):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            stride = max(1, tensor.numel() // _SAMPLED_VALUES)
            digest.update(_raw(tensor.flatten()[::stride]))
        return digest.hexdigest()

    def _facts(self) -> dict[str, str]:
        """What the model is, for people."""
        layers = self.layers
        return {
            "class": type(self.model).__name__,
            "family": ", ".join(sorted({layer.family for layer in layers})),
            "MoE layers": _ranges([layer.index for layer in layers]),
            "experts": ", ".join(sorted({f"{la.num_experts} top-{la.top_k}" for la in layers})),
            "hidden": _numbers({layer.hidden_size for layer in layers}),
            "intermediate": _numbers({layer.intermediate_size for layer in layers}),
            "parameters": f"{self.model.num_parameters():,}",
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": str(self.device),
            "tokenizer": "yes" if self.tokenizer is not None else "none",
        }

    def __repr__(self) -> str:
        facts = "; ".join(f"{name} {fact}" for name, fact in self._facts().items())
        return f"MoEModel({self.name!r}: {facts})"

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><th>{html.escape(name)}</th><td>{html.escape(fact)}</td></tr>"
            for name, fact in self._facts().items()
        )
        return f"<h3>{html.escape(self.name)}</h3><table>{rows}</table>"


def _about_the_model(config: Any) -> Any:
    """A configuration, and those nested in it, without what it says about saving."""
    if not isinstance(config, dict):
        return config
    return {k: _about_the_model(v) for k, v in config.items() if k not in _NOT_THE_MODEL}


def _raw(tensor: Tensor) -> bytes:
    flat = plain(tensor).detach().flatten().contiguous()
    return flat.view(torch.uint8).cpu().numpy().tobytes()


def _numbers(values: set[int]) -> str:
    return ", ".join(str(value) for value in sorted(values))


def _ranges(indices: Sequence[int]) -> str:
    """Layer numbers as people write them: 1-3, 5."""
    runs = []
    for _, run in groupby(enumerate(sorted(set(indices))), key=lambda pair: pair[1] - pair[0]):
        numbers = [number for _, number in run]
        runs.append(str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}")
    return ", ".join(runs)
