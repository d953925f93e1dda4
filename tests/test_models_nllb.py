"""NLLB-MoE is refused for what transformers does to it, and for that alone."""

import pytest
import torch
from transformers import NllbMoeConfig, NllbMoeForConditionalGeneration
from transformers.models.nllb_moe.modeling_nllb_moe import NllbMoeExperts

from moescope.errors import ConformanceError
from moescope.models.conformance import conformance
from moescope.models.load import load

EXPERTS = 6


def build():
    config = NllbMoeConfig(
        vocab_size=97,
        d_model=16,
        encoder_layers=2,
        decoder_layers=2,
        encoder_ffn_dim=12,
        decoder_ffn_dim=12,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        max_position_embeddings=64,
        num_experts=EXPERTS,
        encoder_sparse_step=2,
        decoder_sparse_step=2,
        init_std=0.3,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return NllbMoeForConditionalGeneration(config).eval()


def hidden_states():
    return torch.randn(1, 40, 16, generator=torch.Generator().manual_seed(1))


def by_the_paper(self, hidden_states, router_mask, router_probs):
    """Both experts of every token, weighted; `router_probs` is 0 at all others."""
    output = torch.zeros_like(hidden_states)
    for number in range(self.num_experts):
        expert = self[f"expert_{number}"]
        output += router_probs[:, number, None] * expert(hidden_states)
    return output * (1 - self.moe_token_dropout)


def test_it_is_refused():
    with pytest.raises(ConformanceError, match="experts 0 and 1"):
        load(build())


def test_the_reason_is_true():
    block = build().model.encoder.layers[1].ffn
    ran = set()
    for number in range(EXPERTS):
        block.experts[f"expert_{number}"].register_forward_hook(
            lambda *_, number=number: ran.add(number)
        )
    with torch.no_grad():
        _, weights, _ = block.router(hidden_states())
        block(hidden_states())
    chosen = set(weights.nonzero()[:, -1].tolist())
    assert chosen == set(range(EXPERTS))
    assert ran == {0, 1}


def test_it_would_load_without_the_fault(monkeypatch):
    monkeypatch.setattr(NllbMoeExperts, "forward", by_the_paper)
    model = load(build())
    assert [(layer.stack, layer.index) for layer in model.layers] == [
        ("encoder", 1),
        ("decoder", 1),
    ]
    layer = model.layers[0]
    assert (layer.family, layer.num_experts, layer.top_k) == ("nllb-moe", EXPERTS, 2)
    assert (layer.hidden_size, layer.intermediate_size) == (16, 12)
    ids = torch.randint(3, 97, (2, 9), generator=torch.Generator().manual_seed(2))
    assert conformance(model, ids).passed.all()
    with torch.no_grad():
        routing = layer.route(hidden_states()[0])
        shares = routing.logits.softmax(-1).topk(2)
    assert routing.experts.equal(shares.indices)
    torch.testing.assert_close(routing.weights.sum(1), torch.full((40,), 0.8))
