"""Dense classes that have a mixture-of-experts class beside them, and its configurations."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from transformers import (
    LlamaForCausalLM,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from moescope.errors import ModelError


@dataclass(frozen=True, kw_only=True)
class Target:
    """A mixture-of-experts class that does all that a dense one does outside its feed-forward."""

    dense: type[PreTrainedModel]
    model: type[PreTrainedModel]
    config: type[PreTrainedConfig]
    num_experts: str
    """What it calls the number of experts."""
    neurons: str
    """What it calls the number of neurons of an expert."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Settings that a conversion needs."""
    shared_expert: bool = False
    """Whether every layer must have one."""


_MIXTRAL = Target(
    dense=MistralForCausalLM,
    model=MixtralForCausalLM,
    config=MixtralConfig,
    num_experts="num_local_experts",
    neurons="intermediate_size",
)
_QWEN2 = Target(
    dense=Qwen2ForCausalLM,
    model=Qwen2MoeForCausalLM,
    config=Qwen2MoeConfig,
    num_experts="num_experts",
    neurons="moe_intermediate_size",
    fixed={"norm_topk_prob": True},
    shared_expert=True,
)
_QWEN3 = Target(
    dense=Qwen3ForCausalLM,
    model=Qwen3MoeForCausalLM,
    config=Qwen3MoeConfig,
    num_experts="num_experts",
    neurons="moe_intermediate_size",
    fixed={"norm_topk_prob": True},
)
_TARGETS = {
    "llama": replace(_MIXTRAL, dense=LlamaForCausalLM),
    "mistral": _MIXTRAL,
    "qwen2": _QWEN2,
    "qwen3": _QWEN3,
}
_NOT_CARRIED = frozenset({"architectures", "transformers_version"})


def target_of(config: Mapping[str, Any], name: str) -> Target:
    """The class that a dense model turns into.

    Args:
        config: Its configuration.
        name: What the user calls the model.

    Raises:
        ModelError: There is none.
    """
    kind = config.get("model_type")
    target = _TARGETS.get(str(kind))
    if target is not None:
        return target
    has_experts = any("expert" in setting for setting in config)
    raise ModelError(
        f"{name} has experts already" if has_experts else f"{name} cannot be given experts",
        got=f"model type {kind}",
        expected=f"a dense model of type {', '.join(_TARGETS)}",
        remedy=None
        if has_experts
        else "For other types transformers has no class that is the same but for its experts",
    )


def config_of(
    target: Target, dense: PreTrainedConfig, *, experts: int, top_k: int, neurons: int
) -> PreTrainedConfig:
    """The configuration of the converted model: all that both classes know, and its experts.

    Raises:
        ModelError: The class cannot look at the text as the dense model does.
    """
    kinds = set(getattr(dense, "layer_types", None) or ())
    known = {field.name for field in fields(target.config)} - _NOT_CARRIED
    if len(kinds) > 1 and "layer_types" not in known:
        raise ModelError(
            f"{target.model.__name__} has no layers of different attention",
            got=", ".join(sorted(kinds)),
            expected="full attention, or one sliding window, in all layers",
        )
    carried = {
        name: copy.deepcopy(value)
        for name, value in vars(dense).items()
        if name in known | {"head_dim"}
    }
    sizes = {target.num_experts: experts, "num_experts_per_tok": top_k, target.neurons: neurons}
    if target.shared_expert:
        sizes["shared_expert_intermediate_size"] = neurons
    return target.config(**carried | dict(target.fixed) | sizes)
