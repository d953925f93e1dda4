"""Saliency of experts against the formulas written out token by token."""

import pytest
import torch

import moescope
from moescope.corpora.packing import Packing
from moescope.measures.saliency import Saliency, routed_norms
from moescope.models.observe import observe

TOKENS, TOP_K, NUM_EXPERTS, HIDDEN = 50, 3, 8, 16


def made_up(seed=0):
    """Inputs, routing with dropped slots, and experts that are matrices; expert 5 is never used."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(TOKENS, HIDDEN, generator=g)
    scores = torch.rand(TOKENS, NUM_EXPERTS, generator=g)
    scores[:, 5] = -1
    weights, experts = scores.topk(TOP_K)
    dropped = torch.rand(TOKENS, TOP_K, generator=g) < 0.1
    matrices = torch.randn(NUM_EXPERTS, HIDDEN, HIDDEN, generator=g)
    return x, experts.masked_fill(dropped, -1), weights.masked_fill(dropped, 0), matrices


def written_out(x, experts, weights, outputs, num_experts):
    """All measures by a loop over tokens and slots."""
    frequency, ean, weighted = [0] * num_experts, [0.0] * num_experts, [0.0] * num_experts
    for t in range(len(x)):
        for expert, weight in zip(experts[t].tolist(), weights[t].tolist(), strict=True):
            if expert < 0:
                continue
            norm = outputs(expert, x[t : t + 1]).double().square().sum().sqrt().item()
            frequency[expert] += 1
            ean[expert] += norm
            weighted[expert] += weight * norm
    count = [max(n, 1) for n in frequency]
    return {
        "frequency": frequency,
        "ean": ean,
        "mean_norm": [a / n for a, n in zip(ean, count, strict=True)],
        "weighted_norm": weighted,
        "reap": [a / n for a, n in zip(weighted, count, strict=True)],
    }


def assert_same(found, expected):
    for name, values in expected.items():
        torch.testing.assert_close(
            getattr(found, name).double(), torch.tensor(values).double(), rtol=1e-6, atol=1e-9
        )


def test_against_the_formulas_written_out():
    x, experts, weights, matrices = made_up()

    def outputs(expert, rows):
        return rows @ matrices[expert]

    found = Saliency.of(experts, weights, routed_norms(x, experts, outputs), NUM_EXPERTS)
    assert_same(found, written_out(x, experts, weights, outputs, NUM_EXPERTS))


def test_by_hand_with_a_dropped_slot_and_an_unused_expert():
    experts = torch.tensor([[0, 2], [2, -1]])
    weights = torch.tensor([[0.75, 0.25], [0.5, 0.0]])
    norms = torch.tensor([[2.0, 4.0], [8.0, torch.inf]])  # the last slot was not used
    found = Saliency.of(experts, weights, norms, 4)
    assert found.frequency.tolist() == [1, 0, 2, 0]
    assert found.ean.tolist() == [2, 0, 12, 0]
    assert found.mean_norm.tolist() == [2, 0, 6, 0]
    assert found.weighted_norm.tolist() == [1.5, 0, 5, 0]
    assert found.reap.tolist() == [1.5, 0, 2.5, 0]


def test_batches_add_up():
    x, experts, weights, matrices = made_up(seed=1)
    norms = routed_norms(x, experts, lambda expert, rows: rows @ matrices[expert])
    whole = Saliency.of(experts, weights, norms, NUM_EXPERTS)
    parts = [
        Saliency.of(experts[s], weights[s], norms[s], NUM_EXPERTS)
        for s in (slice(0, 7), slice(7, None))
    ]
    assert_same(
        parts[0] + parts[1],
        {name: getattr(whole, name).tolist() for name in ("frequency", "ean", "reap")},
    )


def test_experts_see_their_own_tokens_only():
    x, experts, _, matrices = made_up(seed=2)
    asked = {}

    def outputs(expert, rows):
        assert expert not in asked
        asked[expert] = rows
        return rows @ matrices[expert]

    norms = routed_norms(x, experts, outputs)
    assert sum(len(rows) for rows in asked.values()) == (experts >= 0).sum()
    for expert, rows in asked.items():
        torch.testing.assert_close(rows, x[(experts == expert).any(1)], rtol=0, atol=0)
    assert (norms[experts < 0] == 0).all()
    assert 5 not in asked


def test_no_tokens():
    experts = torch.empty(0, TOP_K, dtype=torch.int64)
    norms = routed_norms(torch.empty(0, HIDDEN), experts, lambda _, rows: rows)
    found = Saliency.of(experts, norms, norms, NUM_EXPERTS)
    assert found.reap.tolist() == [0] * NUM_EXPERTS


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions(dtype):
    x, experts, _, matrices = made_up()
    x, matrices = x.to(dtype), matrices.to(dtype)
    norms = routed_norms(x, experts, lambda expert, rows: rows @ matrices[expert])
    token, slot = 3, int((experts[3] >= 0).nonzero()[0])
    expected = (x[token] @ matrices[experts[token, slot]]).double().norm()
    torch.testing.assert_close(norms[token, slot].double(), expected, rtol=1e-2, atol=0)


def test_of_a_trained_model_from_what_its_router_used():
    model = moescope.load("tiny", dtype="float32")
    corpus = moescope.Corpus.builtin(Packing(max_tokens=120, length=64, rows=2))
    layer = model.layer(3)
    seen = []
    batch = next(corpus.batches(model.tokenizer))
    with torch.no_grad(), observe([layer], seen.append):
        model.model(batch.input_ids)
    x, routing = seen[0].input, seen[0].routing

    def outputs(expert, rows):
        return layer.expert_outputs(rows, [expert])[0]

    norms = routed_norms(x, routing.experts, outputs)
    found = Saliency.of(routing.experts, routing.weights, norms, layer.num_experts)
    expected = written_out(x, routing.experts, routing.weights, outputs, layer.num_experts)
    assert_same(found, expected)


def test_a_slot_of_weight_zero_is_no_use():
    experts, weights = torch.tensor([[0, 1], [0, 2]]), torch.tensor([[0.5, 0.0], [1.0, 0.5]])
    found = Saliency.of(experts, weights, torch.ones(2, 2), 3)
    assert found.frequency.tolist() == [2, 0, 1]
    assert found.reap.tolist() == [0.75, 0.0, 0.5]
