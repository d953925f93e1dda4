"""Dense models turned into mixtures of experts: the same logits, saved and read, or refused."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors import SafetensorError
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    MistralConfig,
    MistralForCausalLM,
    MixtralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2MoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeForCausalLM,
)

import models_zoo
from moescope.cli import main
from moescope.errors import ModelError, MoEScopeError, OptionError
from moescope.models.load import load
from moescope.surgery.conversion import SplitOptions, UpcycleOptions, split, upcycle

IDS = torch.arange(3, 67).reshape(2, 32)
SIZES = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
}
WINDOW = {"use_sliding_window": True, "sliding_window": 8}
DENSE = {
    "llama": lambda **s: LlamaForCausalLM(LlamaConfig(**SIZES | s)),
    "llama, long": lambda: DENSE["llama"](
        head_dim=16,
        rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 5e4},
        tie_word_embeddings=True,
    ),
    "mistral": lambda **s: MistralForCausalLM(MistralConfig(**SIZES | {"sliding_window": 8} | s)),
    "qwen2": lambda **s: Qwen2ForCausalLM(Qwen2Config(**SIZES | s)),
    "qwen2, window": lambda: DENSE["qwen2"](**WINDOW, max_window_layers=1),
    "qwen3": lambda **s: Qwen3ForCausalLM(Qwen3Config(**SIZES | {"head_dim": 16} | s)),
    "qwen3, window": lambda: DENSE["qwen3"](
        **WINDOW, max_window_layers=0, attention_bias=True, tie_word_embeddings=True
    ),
}
CLASSES = {
    "llama": MixtralForCausalLM,
    "mistral": MixtralForCausalLM,
    "qwen2": Qwen2MoeForCausalLM,
    "qwen3": Qwen3MoeForCausalLM,
}
CONVERSIONS = {
    "upcycled": lambda model: upcycle(model, UpcycleOptions(experts=4, top_k=2)),
    "split": lambda model: split(model, SplitOptions(experts=4)),
    "split at random": lambda model: split(
        model, SplitOptions(experts=3, assignment="random", seed=1)
    ),
}


def dense(name="llama", **settings):
    """A dense model none of whose parameters is zero or one."""
    torch.manual_seed(0)
    model = DENSE[name](**settings).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("conversion", sorted(CONVERSIONS))
@pytest.mark.parametrize("name", sorted(DENSE))
def test_the_output_is_kept_and_read_again_in_a_fresh_load(name, conversion, tmp_path):
    model = dense(name)
    expected = logits(model)
    converted = CONVERSIONS[conversion](model)
    assert type(converted.model.model) is CLASSES[name.split(",")[0]]
    torch.testing.assert_close(logits(converted.model.model), expected, rtol=1e-5, atol=1e-5)
    assert converted.kept
    assert converted.difference < 1e-5
    converted.save(tmp_path / "converted")
    again = load(tmp_path / "converted")
    torch.testing.assert_close(logits(again.model), expected, rtol=1e-5, atol=1e-5)
    tied = again.model.get_input_embeddings().weight is again.model.get_output_embeddings().weight
    assert tied == model.config.tie_word_embeddings


def test_upcycled_experts_are_the_dense_layer_each_in_tensors_of_its_own():
    model = dense("qwen3")
    converted = upcycle(model, UpcycleOptions(experts=4, top_k=1)).model
    mlp = model.model.layers[1].mlp
    before = logits(model)
    for expert in range(4):
        weights = converted.layers[1].expert_weights(expert)
        for got, wanted in (
            (weights.gate, mlp.gate_proj),
            (weights.up, mlp.up_proj),
            (weights.down, mlp.down_proj),
        ):
            torch.testing.assert_close(got, wanted.weight.detach(), rtol=0, atol=0)
    with torch.no_grad():
        for parameter in converted.model.parameters():
            parameter.zero_()
    torch.testing.assert_close(logits(model), before, rtol=0, atol=0)


def test_split_experts_share_out_the_neurons_each_once():
    model = dense("qwen3")
    gate = model.model.layers[1].mlp.gate_proj.weight.detach()
    for assignment in ("contiguous", "random"):
        options = SplitOptions(experts=4, assignment=assignment)
        layer = split(model, options).model.layers[1]
        rows = torch.cat([layer.expert_weights(expert).gate for expert in range(4)])
        order = torch.cdist(rows, gate).argmin(1)
        torch.testing.assert_close(rows, gate[order], rtol=0, atol=0)
        assert sorted(order.tolist()) == list(range(48))
        assert (order.tolist() == list(range(48))) == (assignment == "contiguous")


def test_a_split_with_fewer_experts_per_token_says_by_how_much_it_differs():
    model = dense("llama")
    found = {k: split(model, SplitOptions(experts=4, top_k=k)) for k in (1, 2, 3, 4)}
    assert [conversion.kept for conversion in found.values()] == [False, False, False, True]
    assert found[1].difference > found[2].difference > found[3].difference > 0.01
    assert "not kept" in str(found[2])
    # One expert of four, at four times its output: worked out by hand.
    layer, mlp = found[1].model.layers[0], model.model.layers[0].mlp
    states = torch.randn(5, 32)
    chosen = layer.route(states).experts[:, 0]
    for state, expert in zip(states, chosen.tolist(), strict=True):
        part = slice(12 * expert, 12 * expert + 12)
        hidden = torch.nn.functional.silu(mlp.gate_proj.weight[part] @ state)
        wanted = mlp.down_proj.weight[:, part] @ (hidden * (mlp.up_proj.weight[part] @ state))
        got = layer.block(state.view(1, 1, -1)).flatten()
        torch.testing.assert_close(got, 4 * wanted, rtol=1e-4, atol=1e-4)


def test_noise_and_routers_follow_the_seed_and_leave_the_global_generator_alone():
    model = dense("qwen3")
    state = torch.random.get_rng_state()
    options = UpcycleOptions(experts=4, noise=0.5)
    one, same, other = (
        upcycle(model, changed) for changed in (options, options, replace(options, seed=1))
    )
    assert torch.equal(state, torch.random.get_rng_state())
    parts = [dict(found.model.model.named_parameters()) for found in (one, same, other)]
    assert all(torch.equal(parts[0][name], parts[1][name]) for name in parts[0])
    for name in ("mlp.gate.weight", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"):
        name = f"model.layers.0.{name}"
        assert not torch.equal(parts[0][name], parts[2][name])
    assert not one.kept
    first, second = (one.model.layers[0].expert_weights(e).down for e in (0, 1))
    plain = model.model.layers[0].mlp.down_proj.weight.detach()
    assert float((first - plain).std()) == pytest.approx(0.5 * float(plain.std()), rel=0.1)
    assert not torch.equal(first, second)


def test_the_shared_expert_of_qwen2_moe_adds_nothing_and_can_learn_to():
    layer = upcycle(dense("qwen2"), UpcycleOptions(experts=4)).model.layers[0]
    shared = layer.block.shared_expert
    states = torch.randn(5, 32)
    assert shared(states).abs().max() == 0
    shared(states).sum().backward()
    assert shared.down_proj.weight.grad.abs().max() > 0


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_half_precision_is_kept_up_to_its_rounding(name):
    converted = upcycle(dense(name).bfloat16(), UpcycleOptions(experts=3, top_k=3))
    assert converted.model.dtype == torch.bfloat16
    assert converted.kept
    assert 0 < converted.difference < 0.05


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (lambda: models_zoo.build("mixtral"), ("experts already", "mixtral")),
        (
            lambda: GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=100)),
            ("gpt2", "llama, mistral, qwen2, qwen3"),
        ),
        (lambda: LlamaModel(LlamaConfig(**SIZES)), ("LlamaModel", "LlamaForCausalLM")),
        (lambda: dense("llama", attention_bias=True), ("no place", "q_proj.bias")),
        (lambda: dense("llama", mlp_bias=True), ("experts lack", "gate_proj.bias")),
        (
            lambda: dense("qwen3", **WINDOW, max_window_layers=1),
            ("full_attention, sliding_attention", "Qwen3MoeForCausalLM"),
        ),
    ],
)
def test_what_no_class_can_hold_is_refused_with_the_reason(model, words):
    for convert in (upcycle, split):
        with pytest.raises(ModelError) as refused:
            convert(model())
        assert all(word in str(refused.value) for word in words)


def test_numbers_that_do_not_fit_are_refused():
    model = dense()
    for options, word in (
        (UpcycleOptions(experts=1, top_k=1), "2 or more"),
        (UpcycleOptions(top_k=9), "1 to 8"),
        (UpcycleOptions(top_k=0), "1 to 8"),
        (UpcycleOptions(noise=-1.0), "0 or more"),
    ):
        with pytest.raises(OptionError, match=word):
            upcycle(model, options)
    with pytest.raises(OptionError, match="48 neurons"):
        split(model, SplitOptions(experts=7))
    with pytest.raises(OptionError, match=r"neurons\. Got: 6\. Expected: a multiple of 4"):
        split(model, SplitOptions(experts=8))
    with pytest.raises(OptionError, match="a multiple of 8"):
        split(dense().bfloat16(), SplitOptions(experts=4))


def test_a_full_disk_is_named_and_leaves_nothing(tmp_path, monkeypatch):
    converted = upcycle(dense(), UpcycleOptions(experts=2))

    def fill(folder):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"half of it")
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(converted.model.model, "save_pretrained", fill)
    with pytest.raises(MoEScopeError, match="the disk is full"):
        converted.save(tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_the_commands_convert_a_folder_or_leave_nothing(tmp_path, capsys):
    dense("qwen3").save_pretrained(tmp_path / "dense")
    source, out = str(tmp_path / "dense"), str(tmp_path / "new" / "moe")
    assert main(["upcycle", source, "--out", out, "--experts", "4", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown == json.loads((tmp_path / "new" / "moe" / "conversion.json").read_text())
    assert shown["output_kept"]
    assert (shown["method"], shown["dense"], shown["top_k"]) == ("upcycle", source, 2)
    assert load(out).layers[0].num_experts == 4
    assert main(["upcycle", source, "--out", out]) == 1
    assert "exists already" in capsys.readouterr().err
    parts = str(tmp_path / "new" / "split")
    assert main(["split", source, "--out", parts, "--experts", "4", "--top-k", "2"]) == 0
    assert "The output is not kept" in capsys.readouterr().out
    assert main(["split", "tiny", "--out", str(tmp_path / "new" / "none")]) == 1
    assert "experts already" in capsys.readouterr().err
    names = sorted(path.name for path in (tmp_path / "new").iterdir())
    assert names == ["moe", "split"]
    assert not [path for path in (tmp_path / "new").rglob("*") if path.suffix in (".bin", ".pt")]
