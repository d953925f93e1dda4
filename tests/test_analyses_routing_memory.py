"""Ten times the tokens take no more memory."""

import tracemalloc

import numpy as np
import pytest

import moescope
from moescope.captures.read import Capture
from routing_zoo import chosen, write_capture

WHOLE = ("token_ids", "documents", "domain_of", "rows", "positions", "routing", "routing_shards")
DOCUMENTS, SHARD = 64, 4_096


def refuse(self, *_):
    raise AssertionError("reads a whole capture at once")


@pytest.fixture
def peak(tmp_path, monkeypatch):
    """Peak of what NumPy and Python allocate while `routing` runs, in bytes."""

    def measured(tokens):
        random = np.random.default_rng(0)
        documents = np.sort(random.integers(0, DOCUMENTS, size=tokens))
        documents[-1] = DOCUMENTS - 1
        logits = random.normal(size=(tokens, 32))
        experts = chosen(np.exp(logits), 2, random)
        ids = random.integers(0, 100, size=tokens)
        run = tmp_path / str(tokens)
        routing = {0: (experts, logits), 1: (experts, logits)}
        write_capture(run, routing, documents, tokens=ids, shard_tokens=SHARD)
        for name in WHOLE:
            monkeypatch.setattr(Capture, name, refuse)
        tracemalloc.start()
        moescope.routing(run, permutations=19, bootstrap=50)
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    return measured


def test_memory_does_not_grow_with_the_tokens(peak):
    peak(SHARD)  # imports and caches
    few, many = peak(3 * SHARD), peak(30 * SHARD)
    assert many < 1.05 * few
    assert many < 30 * SHARD * 32 * 4  # less than the logits of one layer
