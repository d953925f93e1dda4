"""Experts and adapters: formulas by hand, files, errors."""

import pytest
import torch
from torch import nn

from adapters_zoo import random_adapter
from moescope.errors import AlignmentError, OptionError
from moescope.experts.activations import ACTIVATIONS, activation
from moescope.experts.adapter import TENSORS, Adapter
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


@pytest.mark.parametrize(
    ("form", "rank", "parameters"),
    [
        ("layer_norm", 6, 36 + 18),
        ("linear", 6, 36 + 6),
        ("orthogonal", 6, 36 + 1 + 6),
        ("low_rank", 2, 2 * 12 + 4 * 6),
        ("scale", 0, 12),
        ("identity", 0, 0),
    ],
)
def test_every_form_by_its_formula_and_through_a_file(form, rank, parameters, tmp_path):
    adapter, x = random_adapter(form, hidden=6), torch.randn(4, 6)
    a = {name: tensor.double() for name, tensor in adapter.tensors().items()}
    z, normal = x.double(), lambda v: (v - v.mean(1, True)) / (v.var(1, False, True) + 1e-5).sqrt()
    wanted = {
        "layer_norm": lambda: normal(z @ a["weight"].T + a["bias"]) * a["gain"] + a["shift"],
        "linear": lambda: z @ a["weight"].T + a["shift"],
        "orthogonal": lambda: a["gain"] * (z @ a["weight"].T) + a["shift"],
        "low_rank": lambda: (
            normal(z * a["diagonal"] + z @ (a["left"] @ a["right"]).T + a["bias"]) * a["gain"]
            + a["shift"]
        ),
        "scale": lambda: a["gain"] * z + a["shift"],
        "identity": lambda: z,
    }[form]()
    torch.testing.assert_close(adapter(x).double(), wanted, atol=1e-5, rtol=1e-5)
    assert (adapter.form, adapter.rank, adapter.num_parameters) == (form, rank, parameters)
    adapter.save(tmp_path / "a.safetensors")
    again = Adapter.load(tmp_path / "a.safetensors")
    assert again.form == form
    assert again.tensors().keys() == adapter.tensors().keys()
    assert all(torch.equal(t, adapter.tensors()[name]) for name, t in again.tensors().items())
    half = adapter.to(dtype=torch.bfloat16)
    assert half(x.bfloat16()).dtype == torch.bfloat16


def test_a_low_rank_file_is_small(tmp_path):
    sizes = {}
    for form in ("low_rank", "layer_norm"):
        random_adapter(form, hidden=128, rank=2).save(tmp_path / form)
        sizes[form] = (tmp_path / form).stat().st_size
    assert sizes["low_rank"] < sizes["layer_norm"] / 10


def test_files_without_a_form_hold_the_one_of_the_study(tmp_path):
    from safetensors.torch import save_file

    new = random_adapter("layer_norm", hidden=6)
    old = {"moescope-adapter-1": '{"eps": 1e-05}'}
    save_file(new.tensors(), tmp_path / "old", old)
    x = torch.randn(3, 6)
    assert torch.equal(Adapter.load(tmp_path / "old")(x), new(x))
    save_file(new.tensors(), tmp_path / "newer", {"moescope-adapter-1": '{"form": "cubic"}'})
    with pytest.raises(AlignmentError, match="unknown adapter form 'cubic'"):
        Adapter.load(tmp_path / "newer")
    save_file(new.tensors(), tmp_path / "altered", {"moescope-adapter-1": '{"form": "low_rank"}'})
    with pytest.raises(AlignmentError, match="cannot read the adapter"):
        Adapter.load(tmp_path / "altered")


def test_tensors_that_are_not_those_of_the_form_are_refused():
    for form in TENSORS:
        wrong = "scale" if form != "scale" else "linear"
        with pytest.raises(AlignmentError, match=f"do not make an adapter of form {wrong}"):
            Adapter(**random_adapter(form).tensors(), form=wrong)


def test_a_file_that_is_no_adapter(tmp_path):
    from safetensors.torch import save_file

    save_file({"weight": torch.zeros(2, 2)}, tmp_path / "other.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    for name in ("other", "broken", "missing"):
        with pytest.raises(AlignmentError, match=name):
            Adapter.load(tmp_path / f"{name}.safetensors")
