"""Experts and adapters: formulas by hand, files, errors."""

import pytest
import torch
from torch import nn

from moescope.errors import AlignmentError, OptionError
from moescope.experts.activations import ACTIVATIONS, activation
from moescope.experts.adapter import Adapter
from moescope.experts.weights import ExpertWeights


def test_gated_expert_by_hand():
    expert = ExpertWeights(
        gate=torch.tensor([[1.0, 0.0]]),
        up=torch.tensor([[0.0, 2.0]]),
        down=torch.tensor([[1.0], [-3.0]]),
        activation="relu",
    )
    outputs = expert(torch.tensor([[2.0, 5.0], [-2.0, 5.0]]))
    assert outputs.tolist() == [[20.0, -60.0], [0.0, 0.0]]
    assert (expert.hidden_size, expert.intermediate_size, expert.num_parameters) == (2, 1, 6)


def test_plain_expert_with_biases_equals_modules():
    up, down = nn.Linear(5, 7), nn.Linear(7, 5)
    expert = ExpertWeights(
        None, up.weight, down.weight, "gelu", up_bias=up.bias, down_bias=down.bias
    )
    x = torch.randn(3, 5)
    torch.testing.assert_close(expert(x), down(nn.functional.gelu(up(x))))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_equal_those_of_transformers(name):
    from transformers.activations import ACT2FN

    x = torch.linspace(-4, 4, 41)
    torch.testing.assert_close(activation(name)(x), ACT2FN[name](x))


def test_unknown_activation_suggests():
    with pytest.raises(OptionError, match="Did you mean 'silu'"):
        activation("silou")


def test_wrong_shapes_are_named():
    with pytest.raises(AlignmentError, match=r"`down` does not fit `up`.*\(5, 4\).*\(4, 5\)"):
        ExpertWeights(None, torch.randn(5, 4), torch.randn(5, 4))
    expert = ExpertWeights(None, torch.randn(5, 4), torch.randn(4, 5))
    with pytest.raises(AlignmentError, match="inputs do not fit"):
        expert(torch.randn(2, 3))


def test_adapter_is_linear_then_layer_norm(tmp_path):
    linear, norm = nn.Linear(6, 6), nn.LayerNorm(6)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    adapter = Adapter(linear.weight, linear.bias, norm.weight, norm.bias)
    x = torch.randn(4, 6)
    torch.testing.assert_close(adapter(x), norm(linear(x)))
    assert adapter.num_parameters == sum(
        p.numel() for p in [*linear.parameters(), *norm.parameters()]
    )
    adapter.save(tmp_path / "a.safetensors")
    again = Adapter.load(tmp_path / "a.safetensors")
    assert torch.equal(again(x), adapter(x))
    assert again.eps == adapter.eps


def test_a_file_that_is_no_adapter(tmp_path):
    from safetensors.torch import save_file

    save_file({"weight": torch.zeros(2, 2)}, tmp_path / "other.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    for name in ("other", "broken", "missing"):
        with pytest.raises(AlignmentError, match=name):
            Adapter.load(tmp_path / f"{name}.safetensors")
