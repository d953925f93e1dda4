"""Speed, memory, and the parameters that a token meets."""

import time

import pytest
import torch

import moescope
from evaluate_zoo import hooked
from models_zoo import build


@pytest.fixture(scope="module")
def model():
    return moescope.load(build("qwen2_moe"))


def test_speed_counts_what_a_token_meets(model):
    table = moescope.evaluate.speed(model, rows=2, length=16, repeats=3)
    row = table.iloc[0]
    expert = model.layers[0].expert_weights(0).num_parameters
    total = sum(p.numel() for p in model.model.parameters())
    assert row.parameters == total
    assert row.active_parameters == total - 2 * (8 - 2) * expert  # two layers, 2 of 8 experts
    tensors = [*model.model.parameters(), *model.model.buffers()]
    assert row.weight_bytes == sum(tensor.nbytes for tensor in tensors)
    assert row.process_bytes > row.weight_bytes
    assert (row.tokens, row.repeats, row.ratio, row["dtype"]) == (32, 3, 1, "float32")
    assert 0 < row.seconds_per_token_low <= row.seconds_per_token <= row.seconds_per_token_high


def test_experts_of_weight_zero_are_not_met(model):
    def best_only(experts, weights):
        kept = torch.zeros_like(weights)
        kept[:, 0] = weights[:, 0]
        return experts, kept

    change = {"best": lambda: model.layers[1].rerouting(best_only)}
    table = moescope.evaluate.speed(model, change, rows=1, length=8, repeats=1)
    expert = model.layers[0].expert_weights(0).num_parameters
    assert table.active_parameters[0] - table.active_parameters[1] == expert


def test_speed_sees_a_slower_model(model):
    def slow(output):
        time.sleep(0.05)
        return output

    change = lambda: hooked(model.layers[0].block, slow)  # noqa: E731
    table = moescope.evaluate.speed(model, {"slow": change}, rows=1, length=8, repeats=5)
    assert table.intervention.tolist() == ["baseline", "slow"]
    assert table.seconds_per_token_low[1] * 8 >= 0.05
    assert table.ratio[1] > 1
    assert table.ratio[0] == 1


def test_tied_weights_count_once():
    model = moescope.load("tiny")
    row = moescope.evaluate.speed(model, rows=1, length=8, repeats=1).iloc[0]
    embedding = model.model.get_input_embeddings().weight
    stored = sum(t.nbytes for t in model.model.state_dict().values())
    assert stored - embedding.nbytes <= row.weight_bytes < stored
