"""Dense models as one expert per layer."""

import numpy as np
import pytest
import torch
from torch.nn.functional import silu
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import models_zoo
import moescope
from moescope.corpora.packing import Packing
from moescope.errors import ModelError, OptionError
from moescope.models.conformance import conformance
from moescope.models.load import load
from moescope.models.observe import observe

_COMMON = {
    "vocab_size": 97,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED = _COMMON | {"num_key_value_heads": 1, "head_dim": 8}
_GPT2 = {"vocab_size": 97, "n_embd": 16, "n_inner": 24, "n_layer": 3, "n_head": 2}
_GPT2 |= {"n_positions": 64, "initializer_range": 0.3}
_T5 = {"vocab_size": 97, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 3, "num_heads": 2}
_T5 |= {"decoder_start_token_id": 0}
_ZOO = {
    "llama": (LlamaForCausalLM, LlamaConfig, _COMMON | {"mlp_bias": True}),
    "mistral": (MistralForCausalLM, MistralConfig, _GROUPED),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, _COMMON | {"num_key_value_heads": 1}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, _GROUPED),
    "gemma2": (Gemma2ForCausalLM, Gemma2Config, _GROUPED),
    "gpt2": (GPT2LMHeadModel, GPT2Config, _GPT2),
    "gpt_neox": (GPTNeoXForCausalLM, GPTNeoXConfig, _COMMON),
    "phi": (PhiForCausalLM, PhiConfig, _COMMON),
    "t5": (T5ForConditionalGeneration, T5Config, _T5),
    "t5, gated": (
        T5ForConditionalGeneration,
        T5Config,
        _T5 | {"feed_forward_proj": "gated-gelu"},
    ),
    "opt": (OPTForCausalLM, OPTConfig, _COMMON | {"ffn_dim": 24, "word_embed_proj_dim": 16}),
    "phi3": (Phi3ForCausalLM, Phi3Config, _COMMON),
}
UNKNOWN = ("opt", "phi3")


def build(family):
    model_class, config_class, options = _ZOO[family]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return model_class(config_class(**options)).eval()


def tokens():
    return torch.randint(3, 97, (2, 11), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", sorted(_ZOO.keys() - UNKNOWN))
def test_every_feed_forward_layer_is_one_expert_that_conforms(family, dtype):
    model = load(build(family).to(dtype), dense_as_experts=True)
    mask = torch.ones_like(tokens())
    mask[1, 6:] = 0
    table = conformance(model, tokens(), attention_mask=mask)
    assert table.passed.all()
    assert (table.family == "dense").all()
    assert table[table["stack"] == "decoder"].layer.tolist() == [0, 1, 2]
    for layer in model.layers:
        assert (layer.num_experts, layer.top_k, layer.has_shared_expert) == (1, 1, False)
        assert (layer.hidden_size, layer.intermediate_size) == (16, 24)


@pytest.mark.parametrize("family", sorted(UNKNOWN))
def test_feed_forward_layers_that_are_no_single_module_are_refused(family):
    with pytest.raises(ModelError, match="feed-forward layers"):
        load(build(family), dense_as_experts=True)


def test_the_refusal_of_a_dense_model_names_the_option():
    with pytest.raises(ModelError, match="`dense_as_experts=True` .*`--dense-as-experts`"):
        load(build("llama"))


def test_a_mixture_of_experts_is_no_dense_model():
    with pytest.raises(ModelError, match="no dense model"):
        load(models_zoo.build("mixtral"), dense_as_experts=True)


def test_all_tokens_go_to_expert_0_with_weight_1_and_it_computes_the_layer():
    model = load(build("qwen2"), dense_as_experts=True)
    mlp = model.model.model.layers[1].mlp
    seen = []
    with torch.no_grad(), observe([model.layer(1)], seen.append, residual=True):
        output = model.forward(tokens(), head=True).logits
        assert output.equal(model.model(tokens()).logits)
    x, routing = seen[0].input, seen[0].routing
    assert routing.experts.tolist() == [[0]] * 22
    assert routing.weights.tolist() == [[1.0]] * 22
    assert routing.logits.tolist() == [[0.0]] * 22
    with torch.no_grad():
        by_hand = (
            silu(x @ mlp.gate_proj.weight.T) * (x @ mlp.up_proj.weight.T)
        ) @ mlp.down_proj.weight.T
        torch.testing.assert_close(seen[0].output, by_hand)
        torch.testing.assert_close(model.layer(1).expert_weights(0)(x), by_hand)


def test_what_is_changed_is_changed_in_the_model_and_only_for_a_while():
    model = load(build("gpt2"), dense_as_experts=True)
    layer = model.layer(1)
    mlp = model.model.transformer.h[1].mlp
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        before = mlp(x)
        with layer.replacing(0, lambda expert, rows: expert(-rows) + 1):
            torch.testing.assert_close(mlp(x), mlp.forward(x))
            replaced = mlp(x)
            with layer.replacing(0, lambda expert, rows: 3 * expert(rows)):
                torch.testing.assert_close(mlp(x), 3 * replaced)
        torch.testing.assert_close(replaced, mlp(-x) + 1)
        with layer.rerouting(lambda experts, weights: (experts, weights / 2)):
            torch.testing.assert_close(mlp(x), before / 2)
            with layer.rerouting(lambda experts, weights: (experts - 1, 0 * weights)):
                assert mlp(x).abs().max() == 0
        assert mlp(x).equal(before)
        with pytest.raises(OptionError, match="masked"), layer.masking([0]):
            pass
        with pytest.raises(OptionError, match="no such expert"):
            layer.expert_weights(1)
        layer.expert_tensors(0)["c_proj.bias"].add_(1)
        torch.testing.assert_close(mlp(x), before + 1)


def test_offloaded_it_is_the_same(tmp_path):
    build("qwen3").save_pretrained(tmp_path)
    whole = load(tmp_path, dense_as_experts=True)
    offloaded = load(tmp_path, dense_as_experts=True, device_map={"": "disk"})
    assert conformance(offloaded, tokens()).passed.all()
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(2))
    for layer, same in zip(offloaded.layers, whole.layers, strict=True):
        assert repr(layer) == repr(same)
        assert layer.expert_outputs(x, [0]).equal(same.expert_outputs(x, [0]))


def test_a_layer_that_repeats_another_is_found_by_alignment(tmp_path):
    """Layer 2 computes what layer 0 does, of turned inputs."""
    raw = build("qwen2")
    turn = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(3))).Q
    first, third = raw.model.layers[0].mlp, raw.model.layers[2].mlp
    with torch.no_grad():
        for name in ("gate_proj", "up_proj"):
            getattr(third, name).weight.copy_(getattr(first, name).weight @ turn)
        third.down_proj.weight.copy_(first.down_proj.weight)
    model = load(raw, dense_as_experts=True)
    ids = np.random.default_rng(0).integers(3, 97, size=(80, 40))
    corpus = moescope.Corpus.from_token_ids({"a": ids.tolist()}, Packing(length=40, packed=False))
    moescope.capture(model, corpus, tmp_path / "captured")
    table = moescope.align(
        tmp_path / "captured", model=model, source=0, target=2, form="orthogonal", controls=False
    ).table
    assert len(table) == 1
    assert table.fvu[0] < 1e-3 < 0.5 < table.fvu_linear[0] < table.fvu_identity[0]
