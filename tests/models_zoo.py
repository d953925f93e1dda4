"""Tiny random models of every family, built in code."""

import torch
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

VOCABULARY = 97
HIDDEN = 32
NUM_EXPERTS = 8
TOP_K = 2

# Weights of the usual size, 0.02, would make the experts of so small a model invisible.
_COMMON = {
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "num_experts_per_tok": TOP_K,
}
_MIXTRAL = _COMMON | {"intermediate_size": 16, "num_local_experts": NUM_EXPERTS}
_OLMOE = _COMMON | {"intermediate_size": 16, "num_experts": NUM_EXPERTS}
_QWEN = _COMMON | {
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_experts": NUM_EXPERTS,
}
_DEEPSEEK = _COMMON | {
    "num_hidden_layers": 3,
    "num_key_value_heads": 4,
    "kv_lora_rank": 8,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "n_routed_experts": NUM_EXPERTS,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.5,
}
_ZOO = {
    "qwen2_moe": (
        Qwen2MoeForCausalLM,
        Qwen2MoeConfig,
        _QWEN | {"shared_expert_intermediate_size": 24},
    ),
    "qwen3_moe": (Qwen3MoeForCausalLM, Qwen3MoeConfig, _QWEN | {"head_dim": 8}),
    "olmoe": (OlmoeForCausalLM, OlmoeConfig, _OLMOE),
    "mixtral": (MixtralForCausalLM, MixtralConfig, _MIXTRAL),
    "deepseek_v2": (DeepseekV2ForCausalLM, DeepseekV2Config, _DEEPSEEK),
    "deepseek_v3": (
        DeepseekV3ForCausalLM,
        DeepseekV3Config,
        _DEEPSEEK | {"n_group": 2, "topk_group": 1},
    ),
}
FAMILIES = list(_ZOO)


def build(family: str, seed: int = 0, **changes: object) -> PreTrainedModel:
    """A random model of `family` with 2 MoE layers (numbers 1 and 2 in the DeepSeek families)."""
    model_class, config_class, options = _ZOO[family]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return model_class(config_class(**(options | changes))).eval()
