"""Eight times the tokens take no more memory."""

import gc
import tracemalloc

import numpy as np
import pytest

import moescope
from moescope.analyses.registry import find
from moescope.captures.read import Capture
from routing_zoo import chosen, write_capture

WHOLE = ("token_ids", "documents", "domain_of", "rows", "positions", "routing", "routing_shards")
DOCUMENTS, SHARD, EXPERTS = 64, 2_048, 32


def refuse(self, *_):
    raise AssertionError("reads a whole capture at once")


def traced(run):
    gc.collect()
    tracemalloc.start()
    moescope.routing(run, permutations=9, bootstrap=9)
    found = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return found


@pytest.fixture
def peak(tmp_path, monkeypatch):
    """Peak of what NumPy and Python allocate while `routing` runs, in bytes."""

    def measured(tokens):
        random = np.random.default_rng(0)
        documents = np.sort(random.integers(0, DOCUMENTS, size=tokens))
        documents[-1] = DOCUMENTS - 1
        logits = random.normal(size=(tokens, EXPERTS))
        experts = chosen(np.exp(logits), 2, random)
        ids = random.integers(0, 100, size=tokens)
        run = tmp_path / str(tokens)
        routing = {0: (experts, logits), 1: (experts, logits)}
        write_capture(run, routing, documents, tokens=ids, shard_tokens=SHARD)
        for name in WHOLE:
            monkeypatch.setattr(Capture, name, refuse)
        # What is allocated once, by whatever happens beside it, is not in both.
        return min(traced(run), traced(run))

    return measured


def test_memory_does_not_grow_with_the_tokens(peak):
    find("routing")  # imports, which tracing makes slow
    peak(SHARD)  # caches
    few, many = peak(2 * SHARD), peak(16 * SHARD)
    assert many < 1.05 * few
    assert many < 16 * SHARD * EXPERTS * 4  # less than the logits of one layer
