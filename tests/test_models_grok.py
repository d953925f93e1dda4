"""Models whose own code keeps experts in a list: grok-1 as published, and with usual names."""

import pytest
import torch
from accelerate import dispatch_model
from torch import nn
from torch.nn.functional import gelu, scaled_dot_product_attention, softmax
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput

from moescope.errors import ConformanceError, ModelError
from moescope.models.conformance import conformance
from moescope.models.load import load
from moescope.models.observe import observe

HIDDEN, WIDTH, EXPERTS, TOP_K, VOCABULARY = 16, 12, 6, 2, 97


class MoeMLP(nn.Module):
    def __init__(self, act):
        super().__init__()
        self.linear_v = nn.Linear(HIDDEN, WIDTH, bias=False)
        self.linear_1 = nn.Linear(WIDTH, HIDDEN, bias=False)
        self.linear = nn.Linear(HIDDEN, WIDTH, bias=False)
        self.act_fn = act

    def forward(self, x):
        return self.linear_1(self.act_fn(self.linear(x)) * self.linear_v(x))


class NamedMLP(nn.Module):
    def __init__(self, act):
        super().__init__()
        self.gate_proj = nn.Linear(HIDDEN, WIDTH, bias=False)
        self.up_proj = nn.Linear(HIDDEN, WIDTH, bias=True)
        self.down_proj = nn.Linear(WIDTH, HIDDEN, bias=True)
        self.act_fn = act

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class MoeBlock(nn.Module):
    def __init__(self, mlp, act):
        super().__init__()
        self.top_k = TOP_K
        self.gate = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.experts = nn.ModuleList(mlp(act) for _ in range(EXPERTS))

    def weights(self, scores):
        return torch.topk(scores, self.top_k, dim=-1)

    def forward(self, hidden_states):
        rows = hidden_states.view(-1, HIDDEN)
        router_logits = self.gate(rows)
        weights, selected = self.weights(softmax(router_logits, dim=1, dtype=torch.float))
        weights = weights.to(rows.dtype)
        output = torch.zeros_like(rows)
        for number, expert in enumerate(self.experts):
            slots, tokens = torch.where((selected == number).T)
            current = expert(rows[tokens]) * weights[tokens, slots, None]
            output.index_add_(0, tokens, current.to(rows.dtype))
        return output.view_as(hidden_states), router_logits


class NormalisedMoeBlock(MoeBlock):
    norm_topk_prob = True

    def weights(self, scores):
        largest, selected = torch.topk(scores, self.top_k, dim=-1)
        return largest / largest.sum(-1, keepdim=True), selected


class SquaredMoeBlock(MoeBlock):
    """Like no published one."""

    def weights(self, scores):
        largest, selected = torch.topk(scores, self.top_k, dim=-1)
        return largest**2, selected


class DecoderLayer(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.qkv = nn.Linear(HIDDEN, 3 * HIDDEN, bias=False)
        self.pre_attn_norm = nn.RMSNorm(HIDDEN)
        self.pre_moe_norm = nn.RMSNorm(HIDDEN)
        self.post_moe_norm = nn.RMSNorm(HIDDEN)
        self.moe_block = block

    def forward(self, x):
        q, k, v = self.qkv(self.pre_attn_norm(x)).chunk(3, -1)
        x = x + scaled_dot_product_attention(q, k, v, is_causal=True)
        output, _ = self.moe_block(self.pre_moe_norm(x))
        return x + self.post_moe_norm(output)


class Grok1Config(PreTrainedConfig):
    model_type = "grok-1"
    hidden_size: int = HIDDEN
    vocab_size: int = VOCABULARY


class Grok1Model(PreTrainedModel):
    config: Grok1Config

    def __init__(self, config, blocks):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(VOCABULARY, HIDDEN)
        self.layers = nn.ModuleList(DecoderLayer(block) for block in blocks)
        self.norm = nn.RMSNorm(HIDDEN)
        self.post_init()

    def forward(self, input_ids, attention_mask=None, use_cache=None):
        x = self.embed_tokens(input_ids)
        for layer in self.layers:
            x = layer(x)
        return BaseModelOutput(last_hidden_state=self.norm(x))


class Grok1ModelForCausalLM(PreTrainedModel, GenerationMixin):
    config: Grok1Config
    base_model_prefix = "model"

    def __init__(self, config, blocks):
        super().__init__(config)
        self.model = Grok1Model(config, blocks)
        self.lm_head = nn.Linear(HIDDEN, VOCABULARY, bias=False)
        self.post_init()

    def forward(self, input_ids, **inputs):
        return CausalLMOutput(logits=self.lm_head(self.model(input_ids, **inputs)[0]))


def build(block=MoeBlock, mlp=MoeMLP, act=None):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        blocks = [block(mlp, act or nn.GELU()) for _ in range(2)]
        model = Grok1ModelForCausalLM(Grok1Config(), blocks)
        for parameter in model.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.3)
    return model.eval()


def tokens():
    return torch.randint(VOCABULARY, (2, 11), generator=torch.Generator().manual_seed(1))


def inputs():
    return torch.randn(50, HIDDEN, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("block", "mlp", "act", "activation"),
    [
        (MoeBlock, MoeMLP, nn.GELU(), "gelu"),
        (MoeBlock, NamedMLP, nn.GELU(approximate="tanh"), "gelu_new"),
        (NormalisedMoeBlock, NamedMLP, nn.SiLU(), "silu"),
    ],
)
def test_it_conforms(block, mlp, act, activation, dtype):
    model = load(build(block, mlp, act).to(dtype))
    mask = torch.ones_like(tokens())
    mask[0, 7:] = 0
    table = conformance(model, tokens(), attention_mask=mask)
    assert table.passed.all()
    assert table.layer.tolist() == [0, 1]
    layer = model.layers[1]
    assert (layer.family, layer.num_experts, layer.top_k) == ("grok-1", EXPERTS, TOP_K)
    assert (layer.hidden_size, layer.intermediate_size) == (HIDDEN, WIDTH)
    assert not layer.has_shared_expert
    assert layer.expert_weights(3).activation == activation


def test_offloaded_it_is_the_same(tmp_path):
    away = {"model.embed_tokens": "cpu", "model.layers": "disk", "model.norm": "cpu"}
    away["lm_head"] = "cpu"
    whole = load(build())
    offloaded = load(dispatch_model(build(), away, "cpu", offload_dir=tmp_path))
    assert next(offloaded.layers[0].block.parameters()).is_meta
    assert conformance(offloaded, tokens()).passed.all()
    assert repr(offloaded.layers[1]) == repr(whole.layers[1])
    outputs = (model.layers[1].expert_outputs(inputs(), [2, 5]) for model in (whole, offloaded))
    assert next(outputs).equal(next(outputs))


def test_weights_that_are_no_formula_of_the_family_are_refused():
    with pytest.raises(ConformanceError, match="grok-1"):
        load(build(SquaredMoeBlock))


def test_experts_with_an_unknown_nonlinearity_are_refused():
    with pytest.raises(ModelError, match="nonlinearity"):
        load(build(act=nn.Mish()))


def test_the_matrices_of_an_expert_by_hand():
    model = build()
    x = inputs()
    expert = load(model).layers[0].expert_weights(4)
    mlp = model.model.layers[0].moe_block.experts[4]
    with torch.no_grad():
        by_hand = (
            gelu(x @ mlp.linear.weight.T) * (x @ mlp.linear_v.weight.T)
        ) @ mlp.linear_1.weight.T
        torch.testing.assert_close(expert(x), by_hand)


def test_routing_by_hand():
    model = load(build())
    seen = []
    with torch.no_grad(), observe(model.layers[:1], seen.append):
        model.forward(tokens())
    x, routing = seen[0].input, seen[0].routing
    gate = model.model.model.layers[0].moe_block.gate.weight
    for row in range(len(x)):
        shares = (gate @ x[row]).exp()
        shares /= shares.sum()
        expected = sorted(range(EXPERTS), key=lambda expert: -shares[expert].item())[:TOP_K]
        assert routing.experts[row].tolist() == expected
        torch.testing.assert_close(routing.weights[row], shares[expected].detach())


def test_what_is_changed_is_changed_in_the_model_and_only_for_a_while():
    model = load(build(NormalisedMoeBlock, NamedMLP, nn.SiLU()))
    layer, block = model.layers[0], model.model.model.layers[0].moe_block
    x = inputs()[None]
    with torch.no_grad():
        before, logits = block(x)
        mine = (layer.route(x[0]).experts == 2).any(1)
        assert 0 < mine.sum() < 50
        with layer.replacing(2, lambda expert, rows: 0 * expert(rows)):
            without, _ = block(x)
        torch.testing.assert_close(without[0, ~mine], before[0, ~mine])
        weights = torch.where(layer.route(x[0]).experts == 2, layer.route(x[0]).weights, 0).sum(1)
        torch.testing.assert_close(
            before - without,
            (weights[:, None] * layer.expert_outputs(x[0], [2])[0])[None],
            atol=1e-5,
            rtol=1e-5,
        )
        with layer.rerouting(lambda experts, weights: (5 - experts, 2 * weights)):
            mirrored, returned = block(x)
        routing = layer.route(x[0])
        expected = sum(
            2
            * routing.weights[:, slot, None]
            * layer.expert_outputs(x[0], range(EXPERTS))[5 - routing.experts[:, slot], range(50)]
            for slot in range(TOP_K)
        )
        torch.testing.assert_close(mirrored[0], expected, atol=1e-5, rtol=1e-5)
        assert returned.equal(logits)
        with layer.masking([2]):
            assert not (layer.route(x[0]).experts == 2).any()
            masked, _ = block(x)
        torch.testing.assert_close(masked[0, ~mine], before[0, ~mine])
        assert not masked[0, mine].allclose(before[0, mine])
        layer.expert_tensors(1)["down_proj.weight"].zero_()
        assert block.experts[1].down_proj.weight.abs().max() == 0
