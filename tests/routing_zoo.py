"""Captures of routing written by hand: any number of tokens, any plan, no model."""

import json

import numpy as np
import torch

from moescope.captures.shards import write_shard


def write_capture(run, routing, documents, *, domains=("a", "b"), tokens=None, shard_tokens=64):
    """Write `run/capture` of routing alone.

    Args:
        run: The run folder.
        routing: By layer number, experts [tokens, top_k] and logits [tokens, experts].
        documents: Document of every token, ascending; even ones are of the first domain.
        domains: Names of the domains.
        tokens: Vocabulary index of every token.
        shard_tokens: Tokens per shard; in a true capture, these are whole rows.
    """
    documents = np.asarray(documents)
    token_ids = np.zeros_like(documents) if tokens is None else np.asarray(tokens)
    folder, entries, named = run / "capture", [], 0
    folder.mkdir(parents=True)
    for first in range(0, len(documents), shard_tokens):
        part = slice(first, min(first + shard_tokens, len(documents)))
        last = int(documents[part][-1]) + 1
        names = [f"d{number}".encode() for number in range(named, last)]
        named = last
        ends = np.cumsum([len(name) for name in names], dtype=np.int64)
        content = {
            "token_ids": torch.tensor(token_ids[part], dtype=torch.int32),
            "documents": torch.tensor(documents[part], dtype=torch.int32),
            "domains": torch.tensor(documents[part] % len(domains), dtype=torch.int16),
            "rows": torch.tensor(documents[part], dtype=torch.int32),
            "positions": torch.arange(part.stop - first, dtype=torch.int32),
            "document_names.bytes": torch.frombuffer(
                bytearray(b"".join(names)) or bytearray(1), dtype=torch.uint8
            )[: sum(map(len, names))],
            "document_names.ends": torch.from_numpy(ends),
        }
        for layer, (experts, logits) in routing.items():
            content |= {
                f"layer.{layer}.experts": torch.tensor(experts[part], dtype=torch.int16),
                f"layer.{layer}.weights": torch.ones(experts[part].shape),
                f"layer.{layer}.logits": torch.tensor(logits[part], dtype=torch.float32),
            }
        about = {"kind": "tokens", "first_token": first, "tokens": part.stop - first}
        entries.append(write_shard(folder, f"tokens-{first:07d}.safetensors", content, **about))
    layers = [
        {"stack": "decoder", "index": layer, "num_experts": logits.shape[1]}
        for layer, (_, logits) in routing.items()
    ]
    manifest = {
        "schema": 2,
        "model": {"name": "in memory", "revision": None, "fingerprint": "0" * 64},
        "layers": layers,
        "domains": list(domains),
        "tokenizer_sha256": None,
        "num_tokens": len(documents),
        "num_documents": int(documents[-1]) + 1,
        "options": {"record": ["routing"], "seed": 0},
        "shards": entries,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))


def chosen(weights, top_k, random):
    """Experts without replacement, by weights [tokens, experts] (Gumbel top-k)."""
    numbers = np.log(weights) + random.gumbel(size=weights.shape)
    return np.argsort(-numbers, axis=1)[:, :top_k]
