"""A tiny random model of every mixture-of-experts family that transformers ships."""

import torch
import transformers
from transformers import PreTrainedModel

from moescope.models.ported.deepseek import DeepseekForCausalLM

VOCABULARY = 97
HIDDEN = 32
TOP_K = 2

# What configurations call their sizes: each takes those that it knows. Weights of the usual size,
# 0.02, would make the experts of so small a model invisible.
_SIZES = {
    "vocab_size": VOCABULARY,
    "unpadded_vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "intermediate_size": 48,
    "dense_intermediate_size": 48,
    "prefix_dense_intermediate_size": 48,
    # attention
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "head_dim": 8,
    "swa_head_dim": 8,
    "v_head_dim": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "q_lora_rank": 16,
    "kv_lora_rank": 8,
    "index_n_heads": 2,
    "index_head_dim": 8,
    "index_topk": 8,
    "sliding_window": 8,
    "sliding_window_size": 8,
    "rel_extent": 16,
    "linear_num_heads": 4,
    "linear_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "mamba_d_state": 8,
    # experts
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "moe_num_experts": 8,
    "num_experts_per_tok": TOP_K,
    "moe_topk": TOP_K,
    "moe_k": TOP_K,
    "moe_intermediate_size": 16,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "moe_num_shared_experts": 1,
    "shared_expert_intermediate_size": 24,
    "shared_experts_intermediate_size": 24,
    "shared_intermediate_size": 24,
    "n_group": 2,
    "topk_group": 1,
    "routed_scaling_factor": 1.5,
    "moe_routed_scaling_factor": 1.5,
    "router_scaling_factor": 1.5,
    "route_scale": 1.5,
    "first_k_dense_replace": 0,
    "num_dense_layers": 0,
}
_LATENT = {"num_key_value_heads": 4}
_SPARSE = {"mlp_layer_types": ["sparse", "sparse"]}
_FULL = {"layer_types": ["full_attention", "full_attention"]}


def _sections(*sizes: int) -> dict[str, object]:
    """Rotary embeddings of three positions: time, height and width."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(sizes)}
    return {"rope_parameters": rope}


# Class of the model, and what its configuration needs besides.
FAMILIES: dict[str, tuple[str, dict[str, object]]] = {
    "afmoe": ("AfmoeForCausalLM", {}),
    "aria_text": ("AriaTextForCausalLM", {}),
    "axk2": ("AXK2ForCausalLM", _LATENT | _SPARSE),
    "bailing_hybrid": ("BailingHybridForCausalLM", _LATENT),
    "beam": ("BeamForCausalLM", _SPARSE),
    "cohere2_moe": ("Cohere2MoeForCausalLM", {}),
    "deepseek": ("DeepseekForCausalLM", {}),
    "deepseek_ocr2_text": ("DeepseekOcr2TextModel", _SPARSE),
    "deepseek_v2": ("DeepseekV2ForCausalLM", _LATENT),
    "deepseek_v3": ("DeepseekV3ForCausalLM", _LATENT | {"first_k_dense_replace": 1}),
    "deepseek_v32": ("DeepseekV32ForCausalLM", _LATENT | _SPARSE),
    "dots1": ("Dots1ForCausalLM", {}),
    "dots3_note_text": ("Dots3NoteForCausalLM", _LATENT | _SPARSE),
    "ernie4_5_moe": ("Ernie4_5_MoeForCausalLM", {}),
    "ernie4_5_vl_moe_text": (
        "Ernie4_5_VLMoeTextModel",
        _SPARSE | _sections(1, 1, 2) | {"moe_intermediate_size": [16, 12]},
    ),
    "exaone_moe": ("ExaoneMoeForCausalLM", {}),
    "flex_olmo": ("FlexOlmoForCausalLM", {}),
    "glm4_moe": ("Glm4MoeForCausalLM", {}),
    "glm4_moe_lite": ("Glm4MoeLiteForCausalLM", _LATENT | _SPARSE),
    "glm4v_moe_text": ("Glm4vMoeTextModel", _sections(1, 1, 0)),
    "glm5_next_text": (
        "Glm5NextTextModel",
        _LATENT | _SPARSE | {"index_kpool": 2, "qk_rope_head_dim": 0},
    ),
    "glm_moe_dsa": ("GlmMoeDsaForCausalLM", _LATENT | _SPARSE),
    "gpt_oss": ("GptOssForCausalLM", {}),
    "granitemoe": ("GraniteMoeForCausalLM", {}),
    "hunyuan_v1_moe": ("HunYuanMoEV1ForCausalLM", {}),
    "hy_v3": ("HYV3ForCausalLM", _SPARSE),
    "hy_v4": ("HYV4ForCausalLM", _SPARSE),
    "inkling_text": ("InklingForCausalLM", {}),
    "jamba": ("JambaForCausalLM", {}),
    "kimi_linear": ("KimiLinearForCausalLM", _LATENT | _SPARSE),
    "kolibri1": ("Kolibri1ForCausalLM", {}),
    "laguna": ("LagunaForCausalLM", _SPARSE),
    "lfm2_moe": ("Lfm2MoeForCausalLM", _FULL),
    "mellum": ("MellumForCausalLM", {}),
    "mimo_v2_flash": ("MiMoV2FlashForCausalLM", _SPARSE),
    "minimax": ("MiniMaxForCausalLM", {}),
    "minimax_m2": ("MiniMaxM2ForCausalLM", {}),
    "minimax_m3_vl_text": ("MiniMaxM3VLForCausalLM", {}),
    "mistral4": ("Mistral4ForCausalLM", _LATENT),
    "mistral_large4_text": ("MistralLarge4TextModel", _LATENT | _SPARSE),
    "mixtral": ("MixtralForCausalLM", {}),
    "olmoe": ("OlmoeForCausalLM", {}),
    "openai_privacy_filter": ("OpenAIPrivacyFilterForTokenClassification", {}),
    "qwen2_moe": ("Qwen2MoeForCausalLM", {}),
    "qwen3_5_moe_text": ("Qwen3_5MoeForCausalLM", {}),
    "qwen3_moe": ("Qwen3MoeForCausalLM", {}),
    "qwen3_next": ("Qwen3NextForCausalLM", {}),
    "qwen3_omni_moe_text": ("Qwen3OmniMoeThinkerTextModel", {}),
    "qwen3_vl_moe_text": ("Qwen3VLMoeTextModel", {}),
    "qwen4_exp_text": ("Qwen4ExpForCausalLM", {}),
    "solar_open": ("SolarOpenForCausalLM", {}),
    "unlimited_ocr_text": ("UnlimitedOcrTextModel", _SPARSE),
}

REFUSED: dict[str, tuple[str, dict[str, object]]] = {
    "axk1": ("AXK1ForCausalLM", _LATENT | _SPARSE),
    "inkling2_text": ("Inkling2ForCausalLM", {}),
    "muse_spark_text": ("MuseSparkTextModel", _SPARSE | {"moe_hidden_size": 24}),
    "nllb-moe": (
        "NllbMoeForConditionalGeneration",
        {
            "d_model": HIDDEN,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 16,
            "decoder_ffn_dim": 16,
            "encoder_sparse_step": 2,
            "decoder_sparse_step": 2,
            "init_std": 0.3,
        },
    ),
}


def model_class(family: str) -> type[PreTrainedModel]:
    """The class of its models, of transformers or ported."""
    name, _ = (FAMILIES | REFUSED)[family]
    ported = {"DeepseekForCausalLM": DeepseekForCausalLM}
    return ported.get(name) or getattr(transformers, name)


def build(family: str, seed: int = 0, **changes: object) -> PreTrainedModel:
    """A random model of `family`; what transformers starts as zeros is random too."""
    _, options = (FAMILIES | REFUSED)[family]
    config_class = model_class(family).config_class
    known = config_class.__dataclass_fields__
    sizes = {name: size for name, size in _SIZES.items() if name in known}
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        model = model_class(family)(config_class(**(sizes | options | changes))).eval()
        biases = [buffer for name, buffer in model.named_buffers() if name.endswith("bias")]
        for tensor in [*model.parameters(), *biases]:
            if not tensor.any():
                tensor.normal_(std=0.3)
    return model
