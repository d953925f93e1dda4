"""DeepSeekMoE, ported: checked against its mathematics written out from a published checkpoint."""

import json
import math

import pytest
import torch
from huggingface_hub.errors import StrictDataclassFieldValidationError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.nn.functional import silu
from transformers import CONFIG_MAPPING, AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from moescope.models.conformance import conformance
from moescope.models.load import load
from moescope.models.ported.deepseek import DeepseekConfig, register

HEADS, HEAD_SIZE, EXPERTS, TOP_K, WIDTH = 4, 8, 8, 3, 12

# As published for deepseek-moe-16b-base, made small.
PUBLISHED = {
    "architectures": ["DeepseekForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_deepseek.DeepseekConfig",
        "AutoModel": "modeling_deepseek.DeepseekModel",
        "AutoModelForCausalLM": "modeling_deepseek.DeepseekForCausalLM",
    },
    "aux_loss_alpha": 0.001,
    "bos_token_id": 95,
    "eos_token_id": 96,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": HEADS * HEAD_SIZE,
    "initializer_range": 0.02,
    "intermediate_size": 40,
    "max_position_embeddings": 64,
    "model_type": "deepseek",
    "moe_intermediate_size": WIDTH,
    "moe_layer_freq": 1,
    "n_routed_experts": EXPERTS,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_attention_heads": HEADS,
    "num_experts_per_tok": TOP_K,
    "num_hidden_layers": 3,
    "num_key_value_heads": HEADS,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 10000,
    "scoring_func": "softmax",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "transformers_version": "4.36.0",
    "use_cache": True,
    "vocab_size": 97,
}


@pytest.fixture(autouse=True)
def registered():
    register()


def is_sparse(config, layer):
    return layer >= config["first_k_dense_replace"] and layer % config["moe_layer_freq"] == 0


def published_tensors(config, seed=0):
    """Random tensors under the published names, one expert at a time."""
    hidden, kv = config["hidden_size"], config["num_key_value_heads"] * HEAD_SIZE
    shapes = {"model.embed_tokens": (97, hidden), "lm_head": (97, hidden), "model.norm": (hidden,)}

    def mlp(path, width):
        for name in ("gate_proj", "up_proj"):
            shapes[f"{path}.{name}"] = (width, hidden)
        shapes[f"{path}.down_proj"] = (hidden, width)

    for layer in range(config["num_hidden_layers"]):
        path = f"model.layers.{layer}"
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{path}.{name}"] = (hidden,)
        for name, rows in (("q", hidden), ("k", kv), ("v", kv), ("o", hidden)):
            shapes[f"{path}.self_attn.{name}_proj"] = (rows, hidden)
        if not is_sparse(config, layer):
            mlp(f"{path}.mlp", config["intermediate_size"])
            continue
        shapes[f"{path}.mlp.gate"] = (EXPERTS, hidden)
        mlp(f"{path}.mlp.shared_experts", config["n_shared_experts"] * WIDTH)
        for expert in range(EXPERTS):
            mlp(f"{path}.mlp.experts.{expert}", WIDTH)
    generator = torch.Generator().manual_seed(seed)
    return {
        f"{name}.weight": torch.randn(shape, generator=generator) * 0.3 + (len(shape) == 1)
        for name, shape in shapes.items()
    }


def publish(folder, **changes):
    """A checkpoint as its authors left it, with code that must not run."""
    folder.mkdir()
    config = PUBLISHED | changes
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("configuration_deepseek", "modeling_deepseek"):
        code = "import pathlib\npathlib.Path(__file__).with_name('RAN').touch()\nraise SystemExit"
        (folder / f"{name}.py").write_text(code)
    # In files that split the experts of a layer, as the published ones do.
    tensors, place = published_tensors(config), {}
    for shard in (0, 1):
        file = f"model-{shard + 1:05d}-of-00002.safetensors"
        part = dict(list(tensors.items())[shard::2])
        save_file(part, folder / file, {"format": "pt"})
        place |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": place})
    )
    return folder


def tensors_in(folder):
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def plain_logits(folder, ids):
    """The forward pass in float64, from the tensors and the fields of the configuration."""
    config = json.loads((folder / "config.json").read_text())
    w = {name.removesuffix(".weight"): t.double() for name, t in tensors_in(folder).items()}

    def norm(x, name):
        return x / (x.square().mean(-1, keepdim=True) + config["rms_norm_eps"]).sqrt() * w[name]

    def mlp(x, path):
        gated = silu(x @ w[f"{path}.gate_proj"].T) * (x @ w[f"{path}.up_proj"].T)
        return gated @ w[f"{path}.down_proj"].T

    def rotate(x):  # [length, heads, head size]: pairs (i, i + half) turn by position * theta_i
        half = HEAD_SIZE // 2
        turned = torch.empty_like(x)
        for position in range(len(x)):
            for i in range(half):
                angle = position * config["rope_theta"] ** (-i / half)
                a, b = x[position, :, i], x[position, :, i + half]
                turned[position, :, i] = a * math.cos(angle) - b * math.sin(angle)
                turned[position, :, i + half] = b * math.cos(angle) + a * math.sin(angle)
        return turned

    def attention(x, path):
        q, k, v = ((x @ w[f"{path}.{n}_proj"].T).unflatten(1, (-1, HEAD_SIZE)) for n in "qkv")
        q, k = rotate(q), rotate(k)
        shared_by = HEADS // config["num_key_value_heads"]
        heads = []
        for head in range(HEADS):
            scores = q[:, head] @ k[:, head // shared_by].T / math.sqrt(HEAD_SIZE)
            scores[torch.ones_like(scores).triu(1).bool()] = -torch.inf
            heads.append(scores.softmax(-1) @ v[:, head // shared_by])
        return torch.cat(heads, 1) @ w[f"{path}.o_proj"].T

    def sparse(x, path):
        output = mlp(x, f"{path}.shared_experts")
        for token, scores in enumerate((x @ w[f"{path}.gate"].T).softmax(-1)):
            chosen = scores.argsort(descending=True)[: config["num_experts_per_tok"]].tolist()
            adds_up_to_one = config["norm_topk_prob"] and len(chosen) > 1
            total = scores[chosen].sum() if adds_up_to_one else 1
            for expert in chosen:
                output[token] += scores[expert] / total * mlp(x[token], f"{path}.experts.{expert}")
        return output

    rows = []
    for row in ids:
        x = w["model.embed_tokens"][row]
        for layer in range(config["num_hidden_layers"]):
            path = f"model.layers.{layer}"
            x = x + attention(norm(x, f"{path}.input_layernorm"), f"{path}.self_attn")
            inner = norm(x, f"{path}.post_attention_layernorm")
            x = x + (sparse if is_sparse(config, layer) else mlp)(inner, f"{path}.mlp")
        rows.append(norm(x, "model.norm") @ w["lm_head"].T)
    return torch.stack(rows)


def tokens():
    return torch.randint(97, (2, 13), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"norm_topk_prob": True},
        {"norm_topk_prob": True, "num_experts_per_tok": 1},
        {"num_key_value_heads": 2},
        {"moe_layer_freq": 2, "num_hidden_layers": 5},
        {"first_k_dense_replace": 0, "n_shared_experts": 1, "rope_theta": 500},
    ],
    ids=str,
)
def test_a_published_checkpoint_gives_the_logits_of_its_mathematics(changes, tmp_path):
    folder = publish(tmp_path / "published", **changes)
    expected = plain_logits(folder, tokens())
    for dtype in (torch.float64, torch.float32):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        with torch.no_grad():
            logits = model(tokens()).logits.double()
        assert ((logits - expected).norm() / expected.norm()).item() <= 1e-5
        if dtype == torch.float64:
            torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("trust_remote_code", [None, False, True])
def test_code_beside_a_checkpoint_does_not_run(trust_remote_code, tmp_path):
    folder = publish(tmp_path / "published")
    for auto_class in (AutoConfig, AutoModel, AutoModelForCausalLM):
        loaded = auto_class.from_pretrained(folder, trust_remote_code=trust_remote_code)
        assert type(loaded).__module__ == "moescope.models.ported.deepseek"
    assert not (folder / "RAN").exists()


def test_saving_writes_the_published_names_and_numbers(tmp_path):
    folder = publish(tmp_path / "published")
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.save_pretrained(tmp_path / "saved")
    original, saved = tensors_in(folder), tensors_in(tmp_path / "saved")
    assert sorted(saved) == sorted(original)
    assert all(saved[name].equal(original[name]) for name in original)
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    renamed = {"rope_theta", "rope_scaling", "torch_dtype", "transformers_version"}
    assert {k: config[k] for k in PUBLISHED.keys() - renamed} == {
        k: PUBLISHED[k] for k in PUBLISHED.keys() - renamed
    }
    assert config["rope_parameters"] == {"rope_theta": 10000, "rope_type": "default"}
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    with torch.no_grad():
        assert again(tokens()).logits.equal(model(tokens()).logits)


def test_generating_with_a_cache_is_choosing_the_likeliest_token_each_time(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(publish(tmp_path / "published"))
    prompt = tokens()[:1]
    generated = model.generate(prompt, max_new_tokens=6, do_sample=False, eos_token_id=None)
    with torch.no_grad():
        for _ in range(6):
            likeliest = model(prompt, use_cache=False).logits[:, -1:].argmax(-1)
            prompt = torch.cat([prompt, likeliest], 1)
    assert generated.tolist() == prompt.tolist()


def test_router_logits_are_those_of_the_sparse_layers(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(publish(tmp_path / "published"))
    with torch.no_grad():
        output = model(tokens(), output_router_logits=True)
    assert [tuple(logits.shape) for logits in output.router_logits] == [(26, EXPERTS)] * 2


def test_a_fresh_model_has_random_weights_of_the_configured_size():
    published = {k: v for k, v in PUBLISHED.items() if k != "auto_map"}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(DeepseekConfig(**published))
    for name, weight in model.named_parameters():
        expected = 0 if weight.ndim == 1 else 0.02
        assert weight.std().item() == pytest.approx(expected, rel=0.2), name


def test_the_byte_level_tokenizer_is_not_taken_for_that_of_llama(tmp_path):
    folder = publish(tmp_path / "published")
    vocabulary = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    told = {"tokenizer_class": "LlamaTokenizerFast", "legacy": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(told))
    text = "a  b\n\u00e9"
    read = AutoTokenizer.from_pretrained(folder)
    assert read(text, add_special_tokens=False).input_ids == tokenizer.encode(text).ids
    assert read.decode(tokenizer.encode(text).ids) == text


@pytest.mark.parametrize("field", [{"scoring_func": "sigmoid"}, {"n_shared_experts": None}])
def test_what_no_published_model_has_is_refused(field):
    with pytest.raises(StrictDataclassFieldValidationError, match=next(iter(field))):
        DeepseekConfig(**field)


def test_registering_again_changes_nothing():
    before = CONFIG_MAPPING["deepseek"]
    register()
    assert CONFIG_MAPPING["deepseek"] is before is DeepseekConfig


def test_loaded_by_name_of_its_folder_it_conforms(tmp_path):
    folder = publish(tmp_path / "published", first_k_dense_replace=2, num_hidden_layers=4)
    model = load(folder)
    assert [layer.index for layer in model.layers] == [2, 3]
    layer = model.layers[0]
    assert (layer.num_experts, layer.top_k, layer.has_shared_expert) == (EXPERTS, TOP_K, True)
    assert conformance(model, tokens()).passed.all()
    tensors = tensors_in(folder)
    expert = layer.expert_weights(5)
    for name in ("gate", "up", "down"):
        assert getattr(expert, name).equal(
            tensors[f"model.layers.2.mlp.experts.5.{name}_proj.weight"]
        )
    assert not (folder / "RAN").exists()
