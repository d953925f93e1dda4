"""Tiny random models of the families that do not follow the common pattern."""

from collections.abc import Callable
from functools import partial

import torch
import transformers
from transformers import PreTrainedModel

VOCABULARY = 97
HIDDEN = 32
NUM_EXPERTS = 8
TOP_K = 2
WIDTH = 16

_TOKENS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
# Weights of the usual size, 0.02, would make the experts of so small a model invisible.
_COMMON = _TOKENS | {
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "num_experts_per_tok": TOP_K,
}
_LOCAL = _COMMON | {"intermediate_size": WIDTH, "num_local_experts": NUM_EXPERTS}
_GRANITE = _LOCAL | {"shared_intermediate_size": 24, "residual_multiplier": 0.7}
_LATENT_ATTENTION = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 8,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "head_dim": 8,
}
_LLAMA4 = _LOCAL | {"head_dim": 8, "intermediate_size_mlp": 48, "attention_chunk_size": 64}
_SWITCH = _TOKENS | {
    "d_model": HIDDEN,
    "d_kv": 8,
    "d_ff": WIDTH,
    "num_layers": 4,
    "num_decoder_layers": 4,
    "num_heads": 4,
    "num_experts": NUM_EXPERTS,
    "expert_capacity": 2,
    "num_sparse_encoder_layers": 2,
    "num_sparse_decoder_layers": 2,
    "decoder_start_token_id": 0,
    "initializer_factor": 1.0,
}
_NEMOTRON = _COMMON | {
    "layers_block_type": ["linear_attention", "moe", "full_attention", "moe", "mlp"],
    "head_dim": 8,
    "intermediate_size": 48,
    "ssm_state_size": 8,
    "mamba_num_heads": 4,
    "mamba_head_dim": 8,
    "n_groups": 2,
    "n_routed_experts": NUM_EXPERTS,
    "moe_intermediate_size": WIDTH,
    "moe_shared_expert_intermediate_size": 24,
    "routed_scaling_factor": 1.5,
    "initializer_range": 0.2,  # or squares of neurons would be far from 1
}
del _NEMOTRON["num_hidden_layers"]
_STEP_TEXT = _COMMON | {
    "head_dim": 8,
    "intermediate_size": 48,
    "moe_intermediate_size": WIDTH,
    "share_expert_dim": 24,
    "num_local_experts": NUM_EXPERTS,
    "n_routed_experts": NUM_EXPERTS,
    "moe_router_scaling_factor": 3.0,
    "mlp_layer_types": ["dense", "sparse"],
    "sliding_window": 32,
}
_FLINT = _COMMON | {
    "head_dim": 8,
    "intermediate_size": 48,
    "moe_intermediate_size": WIDTH,
    "shared_expert_intermediate_size": 24,
    "num_experts": NUM_EXPERTS,
    "mlp_only_layers": [],
    "sliding_window": 33,
}
_DEEPSEEK_V4 = _COMMON | {
    "num_key_value_heads": 1,
    "head_dim": 16,
    "q_lora_rank": 16,
    "o_groups": 2,
    "o_lora_rank": 8,
    "moe_intermediate_size": WIDTH,
    "n_routed_experts": NUM_EXPERTS,
    "layer_types": ["sliding_attention"] * 2,
    "hc_mult": 2,
    "sliding_window": 32,
    "partial_rotary_factor": 0.5,
    "index_n_heads": 2,
    "index_head_dim": 8,
    "index_topk": 4,
}
_GEMMA4 = _COMMON | {
    "head_dim": 8,
    "global_head_dim": 8,
    "intermediate_size": 24,
    "moe_intermediate_size": WIDTH,
    "num_experts": NUM_EXPERTS,
    "top_k_experts": TOP_K,
    "enable_moe_block": True,
    "hidden_size_per_layer_input": 0,
    "layer_types": ["sliding_attention", "full_attention"],
}
_VISION = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "image_size": 28,
    "patch_size": 14,
}


_GEMMA4_VISION = _VISION | {
    "num_key_value_heads": 2,
    "head_dim": 8,
    "position_embedding_size": 16,
}

# These start as zeros or ones, so that mistakes with them would not show.
_SET_APART = ("bias", "per_expert_scale", "router.scale", "layernorm_2.weight")


def build(model_class: type, config: object, seed: int = 0) -> PreTrainedModel:
    """A random model in evaluation mode, its biases and scales included."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = model_class(config).eval()
        with torch.no_grad():
            for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
                if name.endswith(
                    ("bias", "per_expert_scale", "router.scale", "layernorm_2.weight")
                ):
                    tensor.add_(0.1 * torch.randn_like(tensor))
    return model


def switch(**changes: object) -> PreTrainedModel:
    """Encoder and decoder; every second block is sparse."""
    config = transformers.SwitchTransformersConfig(**(_SWITCH | changes))
    return build(transformers.SwitchTransformersForConditionalGeneration, config)


def dbrx(**changes: object) -> PreTrainedModel:
    """Changes are those of the feed-forward part."""
    experts = {
        "hidden_size": HIDDEN,
        "ffn_hidden_size": WIDTH,
        "moe_num_experts": NUM_EXPERTS,
        "moe_top_k": TOP_K,
    }
    config = transformers.DbrxConfig(
        **_TOKENS,
        d_model=HIDDEN,
        n_heads=4,
        n_layers=2,
        max_seq_len=64,
        initializer_range=0.3,
        attn_config={"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        ffn_config=experts | changes,
    )
    return build(transformers.DbrxForCausalLM, config)


def jetmoe(**changes: object) -> PreTrainedModel:
    """Its attention has experts too."""
    config = transformers.JetMoeConfig(**(_LOCAL | {"kv_channels": 8} | changes))
    return build(transformers.JetMoeForCausalLM, config)


def longcat_flash(**changes: object) -> PreTrainedModel:
    """The last 3 of 8 experts are the identity."""
    config = transformers.LongcatFlashConfig(
        **(
            _TOKENS
            | _LATENT_ATTENTION
            | {
                "hidden_size": HIDDEN,
                "num_layers": 2,
                "num_attention_heads": 4,
                "initializer_range": 0.3,
                "ffn_hidden_size": 48,
                "moe_topk": 4,
                "n_routed_experts": NUM_EXPERTS - 3,
                "zero_expert_num": 3,
                "expert_ffn_hidden_size": WIDTH,
                "routed_scaling_factor": 1.5,
            }
            | changes
        )
    )
    return build(transformers.LongcatFlashForCausalLM, config)


def nemotron_h(**changes: object) -> PreTrainedModel:
    """Mamba, attention, dense and sparse layers; experts live in a smaller space."""
    changes = {"moe_latent_size": 24, "mlp_bias": True} | changes
    return build(
        transformers.NemotronHForCausalLM, transformers.NemotronHConfig(**(_NEMOTRON | changes))
    )


def granitemoeshared(**changes: object) -> PreTrainedModel:
    """The shared expert lies beside the block."""
    return build(
        transformers.GraniteMoeSharedForCausalLM,
        transformers.GraniteMoeSharedConfig(**(_GRANITE | changes)),
    )


def granitemoehybrid(**changes: object) -> PreTrainedModel:
    """One Mamba layer, one of attention."""
    state = {"mamba_n_heads": 8, "mamba_d_state": 8, "mamba_chunk_size": 8}
    layers = {"layer_types": ["linear_attention", "full_attention"]}
    config = transformers.GraniteMoeHybridConfig(**(_GRANITE | state | layers | changes))
    return build(transformers.GraniteMoeHybridForCausalLM, config)


def llama4(**changes: object) -> PreTrainedModel:
    """Text only."""
    return build(
        transformers.Llama4ForCausalLM, transformers.Llama4TextConfig(**(_LLAMA4 | changes))
    )


def llama4_with_images() -> PreTrainedModel:
    """Within a model that also sees."""
    vision = _VISION | {"vision_output_dim": 32, "projector_input_dim": 16}
    vision |= {"projector_output_dim": 32}
    config = transformers.Llama4Config(text_config=_LLAMA4, vision_config=vision)
    return build(transformers.Llama4ForConditionalGeneration, config)


def step3p7(**changes: object) -> PreTrainedModel:
    """Sees images; the first layer is dense."""
    config = transformers.Step3p7Config(
        text_config=_STEP_TEXT | changes, vision_config=_VISION, image_token_id=3
    )
    return build(transformers.Step3p7ForConditionalGeneration, config)


def gemma4(**changes: object) -> PreTrainedModel:
    """Text only; a dense network beside the experts."""
    return build(
        transformers.Gemma4ForCausalLM, transformers.Gemma4TextConfig(**(_GEMMA4 | changes))
    )


def gemma4_with_images() -> PreTrainedModel:
    """Within a model that also sees."""
    places = ("image", "video", "audio", "boi", "eoi", "boa")
    tokens = {f"{name}_token_id": 90 + number for number, name in enumerate(places)}
    config = transformers.Gemma4Config(
        text_config=_GEMMA4, vision_config=_GEMMA4_VISION, eoa_token_index=96, **tokens
    )
    return build(transformers.Gemma4ForConditionalGeneration, config)


def deepseek_v4(**changes: object) -> PreTrainedModel:
    """Without layers that choose by token id, unless changed."""
    changes = {"mlp_layer_types": ["moe", "moe"]} | changes
    return build(
        transformers.DeepseekV4ForCausalLM,
        transformers.DeepseekV4Config(**(_DEEPSEEK_V4 | changes)),
    )


def zaya() -> PreTrainedModel:
    """Routers pass a state on to the next."""
    config = transformers.ZayaConfig(
        **(_COMMON | {"num_experts_per_tok": 1}),
        head_dim=8,
        moe_intermediate_size=WIDTH,
        num_experts=NUM_EXPERTS,
        router_hidden_size=16,
    )
    return build(transformers.ZayaForCausalLM, config)


def diffusion_gemma() -> PreTrainedModel:
    """Decodes what it has not read."""
    config = transformers.DiffusionGemmaConfig(
        text_config=_GEMMA4,
        vision_config=_GEMMA4_VISION | {"model_type": "gemma4_vision"},
        canvas_length=8,
    )
    return build(transformers.DiffusionGemmaForBlockDiffusion, config)


def doge() -> PreTrainedModel:
    """Product keys."""
    config = transformers.DogeConfig(
        **_COMMON, intermediate_size=WIDTH, is_moe=True, num_experts=16
    )
    return build(transformers.DogeForCausalLM, config)


DEVIANTS: dict[str, Callable[[], PreTrainedModel]] = {
    "switch_transformers": switch,
    "dbrx": dbrx,
    "jetmoe": jetmoe,
    "longcat_flash": longcat_flash,
    "nemotron_h": nemotron_h,
    "granitemoeshared": granitemoeshared,
    "granitemoehybrid": granitemoehybrid,
    "granitemoe_swa": partial(
        build, transformers.GraniteMoeSWAForCausalLM, transformers.GraniteMoeSWAConfig(**_GRANITE)
    ),
    "llama4_text": llama4,
    "gemma4_text": gemma4,
    "step3p7": step3p7,
    "flint": partial(build, transformers.FlintForCausalLM, transformers.FlintConfig(**_FLINT)),
    "deepseek_v4": deepseek_v4,
    "phimoe": partial(build, transformers.PhimoeForCausalLM, transformers.PhimoeConfig(**_LOCAL)),
}
"""Those that work, by what their layers are called."""
REFUSED: dict[str, Callable[[], PreTrainedModel]] = {
    "deepseek_v4": partial(deepseek_v4, mlp_layer_types=["hash_moe", "moe"]),
    "diffusion_gemma": diffusion_gemma,
    "doge": doge,
    "zaya": zaya,
}
"""Those that do not, by model type."""
