"""DeepSeekMoE (`deepseek-moe-16b`), published with code of its own, which is not needed here."""

# Half of transformers is annotated, and its classes expect the configurations of their own models.
# mypy: allow-untyped-calls, disable-error-code="arg-type, assignment"

from typing import Any, Literal, no_type_check

import torch
from huggingface_hub.dataclasses import strict
from jaxtyping import Float
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    DeepseekV2ForCausalLM,
    DeepseekV2Model,
    DeepseekV2PreTrainedModel,
    LlamaConfig,
    PreTrainedModel,
    conversion_mapping,
    initialization,
)
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2MLP
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeExperts, Qwen2MoeTopKRouter
from transformers.utils.output_capturing import OutputRecorder


@no_type_check  # its signature hides that it takes fields of other versions too; `strict` checks
@strict
class DeepseekConfig(LlamaConfig):
    """The fields of the published `config.json`, with the defaults of the published code."""

    model_type = "deepseek"
    attribute_map = {"num_experts": "n_routed_experts"}  # noqa: RUF012

    vocab_size: int = 102400
    bos_token_id: int | None = 100000
    eos_token_id: int | list[int] | None = 100001
    n_routed_experts: int = 64
    """Experts of a sparse layer that the router chooses from."""
    n_shared_experts: int = 2
    """Experts of a sparse layer that every token goes through, held as one wide expert."""
    num_experts_per_tok: int = 6
    """Routed experts per token."""
    moe_intermediate_size: int = 1407
    """Neurons of one expert, routed or shared."""
    first_k_dense_replace: int = 0
    """Number of the first layer that may be sparse."""
    moe_layer_freq: int = 1
    """Of those, the layers whose number is a multiple of this are sparse."""
    norm_topk_prob: bool = False
    """Whether the weights of the chosen experts add up to one."""
    scoring_func: Literal["softmax"] = "softmax"
    """What makes router logits into weights."""


class DeepseekMoE(nn.Module):
    """A sparse block: routed experts and the shared ones, added (arXiv 2401.06066, eq. 9-11)."""

    def __init__(self, config: DeepseekConfig) -> None:
        super().__init__()
        self.gate = Qwen2MoeTopKRouter(config)
        # A single expert keeps its probability in the published code.
        self.gate.norm_topk_prob = config.norm_topk_prob and config.num_experts_per_tok > 1
        self.experts = Qwen2MoeExperts(config)
        width = config.n_shared_experts * config.moe_intermediate_size
        self.shared_experts = DeepseekV2MLP(config, intermediate_size=width)

    def forward(
        self, hidden_states: Float[Tensor, "rows length hidden"]
    ) -> Float[Tensor, "rows length hidden"]:
        """Shared experts plus the weighted outputs of the chosen experts."""
        tokens = hidden_states.flatten(0, 1)
        _, weights, experts = self.gate(tokens)
        routed: Tensor = self.experts(tokens, experts, weights)
        shared: Tensor = self.shared_experts(hidden_states)
        return routed.view_as(hidden_states) + shared


class DeepseekDecoderLayer(LlamaDecoderLayer):
    """Attention as in Llama; the layers that the configuration says are sparse."""

    def __init__(self, config: DeepseekConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        beyond_dense = layer_idx >= config.first_k_dense_replace
        if beyond_dense and layer_idx % config.moe_layer_freq == 0:
            self.mlp = DeepseekMoE(config)


class DeepseekPreTrainedModel(DeepseekV2PreTrainedModel):
    """What transformers wants to know about the classes."""

    config: DeepseekConfig
    _no_split_modules = ["DeepseekDecoderLayer"]  # noqa: RUF012
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": DeepseekDecoderLayer,
        "attentions": LlamaAttention,
        "router_logits": OutputRecorder(Qwen2MoeTopKRouter, index=0),
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        PreTrainedModel._init_weights(self, module)
        if isinstance(module, Qwen2MoeTopKRouter | Qwen2MoeExperts):
            for weight in module.parameters():
                initialization.normal_(weight, std=self.config.initializer_range)


class DeepseekModel(DeepseekPreTrainedModel, DeepseekV2Model):
    """Embeddings, decoder layers, norm."""

    def __init__(self, config: DeepseekConfig) -> None:
        PreTrainedModel.__init__(self, config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(
            DeepseekDecoderLayer(config, index) for index in range(config.num_hidden_layers)
        )
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()


class DeepseekForCausalLM(DeepseekPreTrainedModel, DeepseekV2ForCausalLM):
    """DeepSeekMoE with its language-modelling head."""

    def __init__(self, config: DeepseekConfig) -> None:
        PreTrainedModel.__init__(self, config)
        self.model = DeepseekModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


def register() -> None:
    """Have the Auto classes read `model_type: deepseek`, unless they can already.

    Code that comes with a checkpoint is not run, whatever `trust_remote_code` says. Experts are
    read and saved one by one, under the published names.
    """
    if DeepseekConfig.model_type in CONFIG_MAPPING:
        return
    AutoConfig.register(DeepseekConfig.model_type, DeepseekConfig)
    AutoModel.register(DeepseekConfig, DeepseekModel)
    AutoModelForCausalLM.register(DeepseekConfig, DeepseekForCausalLM)
    one_by_one: Any = conversion_mapping.get_checkpoint_conversion_mapping("qwen2_moe")
    conversion_mapping.register_checkpoint_conversion_mapping(
        DeepseekConfig.model_type, one_by_one, overwrite=True
    )
