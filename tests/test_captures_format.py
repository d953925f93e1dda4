"""The format on disk, byte by byte: numbers written down here, not computed by the package."""

import hashlib
import json
import struct
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from moescope.captures.record import capture
from moescope.corpora.corpus import Corpus
from moescope.corpora.packing import Packing
from moescope.experts.weights import ExpertWeights
from moescope.models.view import MoELayer, MoEModel, Routing

# Token t has the input (t, -t); even tokens use expert 0 with weight 1, odd ones expert 1 with 0.5.


class Router(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))

    def forward(self, x):
        return x @ self.weight.T


class Experts(nn.Module):
    def forward(self, x, experts, weights):
        return x * weights


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.router, self.experts = Router(), Experts()

    def forward(self, x):
        flat = x.reshape(-1, 2)
        self.router(flat)
        odd = flat[:, :1].long() % 2
        return self.experts(flat, odd, 1.0 - odd / 2).reshape(x.shape)


class HandMade(PreTrainedModel):
    config_class = PreTrainedConfig
    base_model_prefix = ""

    def __init__(self, config):
        super().__init__(config)
        tokens = torch.arange(8.0)
        self.table = nn.Embedding.from_pretrained(torch.stack([tokens, -tokens], 1))
        self.block = Block()

    def get_input_embeddings(self):
        return self.table

    def forward(self, input_ids, attention_mask, use_cache):
        return SimpleNamespace(last_hidden_state=self.block(self.table(input_ids)))


class HandMadeLayer(MoELayer):
    top_k, intermediate_size = 1, 1

    @property
    def router(self) -> nn.Module:
        return self.block.router

    @property
    def router_weight(self):
        return self.block.router.weight

    def router_logits(self, router_output):
        return router_output

    @contextmanager
    def on_routing(self, seen):
        handle = self.block.experts.register_forward_pre_hook(lambda _, given: seen(*given[1:]))
        yield
        handle.remove()

    def route(self, x) -> Routing:
        raise NotImplementedError

    def expert_outputs(self, x, experts):
        raise NotImplementedError

    def shared_output(self, x):
        return None

    def expert_weights(self, expert) -> ExpertWeights:
        raise NotImplementedError

    def expert_tensors(self, expert):
        raise NotImplementedError

    def replacing(self, expert, function):
        raise NotImplementedError

    def rerouting(self, change):
        raise NotImplementedError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    network = HandMade(PreTrainedConfig(vocab_size=8, num_hidden_layers=6))
    layer = HandMadeLayer(network.block, network, index=5, family="hand_made")
    model = MoEModel(model=network, tokenizer=None, layers=[layer], name="hand made")
    given = {"é": [[1, 2, 3]], "b": [[4, 5], [6, 7]]}
    corpus = Corpus.from_token_ids(given, Packing(length=3, rows=2, shuffle=0))
    recorded = capture(
        model,
        corpus,
        tmp_path_factory.mktemp("run"),
        tokens=2,
        tokens_per_expert=2,
        dtype="float32",
    )
    return recorded.folder


def parsed(path):
    """Read a safetensors file by its specification."""
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    formats = {"I16": "h", "I32": "i", "I64": "q", "F32": "f", "U8": "B"}
    tensors = {}
    for name, entry in header.items():
        start, stop = entry["data_offsets"]
        values = body[start:stop]
        count = len(values) // struct.calcsize(formats[entry["dtype"]])
        numbers = struct.unpack(f"<{count}{formats[entry['dtype']]}", values)
        tensors[name] = (entry["dtype"], entry["shape"], list(numbers))
    return tensors


def test_tokens(folder):
    # Rows: [1 2 3], [4 5 6], [7]; first positions are left out, so 7 never enters.
    assert parsed(folder / "tokens-00000.safetensors") == {
        "token_ids": ("I32", [4], [2, 3, 5, 6]),
        "documents": ("I32", [4], [0, 0, 1, 2]),
        "domains": ("I16", [4], [0, 0, 1, 1]),
        "rows": ("I32", [4], [0, 0, 1, 1]),
        "positions": ("I32", [4], [1, 2, 1, 2]),
        "layer.5.experts": ("I16", [4, 1], [0, 1, 1, 0]),
        "layer.5.weights": ("F32", [4, 1], [1.0, 0.5, 0.5, 1.0]),
        "layer.5.logits": ("F32", [4, 2], [2, -2, 3, -3, 5, -5, 6, -6]),
        "document_names.bytes": ("U8", [10], list("é:0b:0b:1".encode())),
        "document_names.ends": ("I64", [3], [4, 7, 10]),
    }


def test_wide_tensors(folder):
    assert parsed(folder / "rows-00000.safetensors") == {
        "layer.5.tokens": ("I64", [2], [0, 1]),
        "layer.5.inputs": ("F32", [2, 2], [2, -2, 3, -3]),
    }
    # Both experts want two tokens and have two: one each in the whole row, the others are here.
    assert parsed(folder / "sample-005-00000.safetensors") == {
        "layer.5.tokens": ("I64", [2], [2, 3]),
        "layer.5.inputs": ("F32", [2, 2], [5, -5, 6, -6]),
    }


def test_manifest(folder):
    text = (folder / "manifest.json").read_text(encoding="utf-8")
    manifest = json.loads(text)
    libraries = manifest.pop("libraries")
    assert set(libraries) == {"moescope", "torch", "transformers", "numpy", "scipy", "pandas"}
    assert len(manifest["model"].pop("fingerprint")) == 64
    sources = manifest["corpus"].pop("sources")
    assert sources == {
        "é": {"source": "token ids", "sha256": hashlib.sha256(b"[[1, 2, 3]]").hexdigest()},
        "b": {"source": "token ids", "sha256": hashlib.sha256(b"[[4, 5], [6, 7]]").hexdigest()},
    }
    shards = manifest.pop("shards")
    assert manifest == {
        "schema": 2,
        "model": {
            "name": "hand made",
            "revision": None,
            "class": "HandMade",
            "model_type": "",
            "vocab_size": 8,
            "num_hidden_layers": 6,
            "dtype": "float32",
        },
        "tokenizer_sha256": None,
        "corpus": {
            "packing": {
                "length": 3,
                "rows": 2,
                "packed": True,
                "skip_first": True,
                "keep_padding": False,
                "max_tokens": None,
                "shuffle": 0,
                "seed": 0,
            }
        },
        "domains": ["é", "b"],
        "layers": [
            {
                "stack": "decoder",
                "index": 5,
                "family": "hand_made",
                "num_experts": 2,
                "top_k": 1,
                "hidden_size": 2,
                "intermediate_size": 1,
                "weighs_inputs": False,
                "unused_slots": 0,
            }
        ],
        "options": {
            "record": ["routing", "inputs"],
            "tokens": 2,
            "tokens_per_expert": 2,
            "layers": [5],
            "dtype": "float32",
            "seed": 0,
            "shard_tokens": 32768,
        },
        "num_rows": 3,
        "num_tokens": 4,
        "num_documents": 3,
        "num_whole_row_tokens": 2,
        "data_sha256": chained_by_hand(),
    }
    for entry in shards:
        data = (folder / entry["file"]).read_bytes()
        assert entry["bytes"] == len(data)
        assert entry["sha256"] == hashlib.sha256(data).hexdigest()
    assert [
        {k: v for k, v in entry.items() if k not in ("bytes", "sha256")} for entry in shards
    ] == [
        {"file": "tokens-00000.safetensors", "kind": "tokens", "first_token": 0, "tokens": 4},
        {"file": "rows-00000.safetensors", "kind": "rows", "layers": [5]},
        {"file": "sample-005-00000.safetensors", "kind": "sample", "layers": [5]},
    ]


def chained_by_hand():
    """Ids, documents, domains and kept flags of each row as little-endian int32."""
    digest = ""
    for row in (
        [1, 2, 3, 0, 0, 0, 0, 0, 0, 0, 1, 1],
        [4, 5, 6, 1, 1, 2, 1, 1, 1, 0, 1, 1],
        [7, 2, 1, 0],
    ):
        digest = hashlib.sha256(digest.encode() + struct.pack(f"<{len(row)}i", *row)).hexdigest()
    return digest


# fmt: off
GOLDEN = {
    "tokens-00000.safetensors": "fbe1c374a7d1b31a4f8ad5e8a197b1c0ccfcacfabe1899a0f6a893855b76f1a8",
    "rows-00000.safetensors": "e6a5d96dbc6aa9f3c48a56ab8b1a4101ef33e326888512071ca0faf36aba7aab",
    "sample-005-00000.safetensors":
        "7bcc82e73289c7b66223928a22e7d000712bc6f6a0a4634c64e97762226bfe2a",
}
# fmt: on


@pytest.mark.parametrize("file", GOLDEN)
def test_golden_bytes(folder, file):
    """A change here is a new schema version, unless only the writer's header changed."""
    assert hashlib.sha256((folder / file).read_bytes()).hexdigest() == GOLDEN[file]


def test_there_is_nothing_else(folder):
    assert {path.name for path in folder.iterdir()} == {*GOLDEN, "manifest.json"}
