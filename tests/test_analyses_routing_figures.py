"""Figures of `routing`: every table has one, of every stack."""

import dataclasses

import numpy as np
import pandas as pd
import pytest

import moescope
from moescope.reports.registry import chapter
from results_zoo import routing_result
from routing_zoo import chosen, write_capture

NAMES = [
    "routing-shares",
    "routing-load",
    "routing-entropy",
    "routing-experts",
    "routing-half",
    "routing-divergence",
    "routing-logits",
    "routing-coactivation",
    "routing-transitions",
    "routing-tokens",
]


def result(run, *, experts=4, top_k=2, layers=2, domains=("a", "b")):
    random = np.random.default_rng(0)
    documents = np.repeat(np.arange(8), 40)
    logits = random.normal(size=(len(documents), experts))
    used = chosen(np.exp(logits), top_k, random)
    routing = dict.fromkeys(range(layers), (used, logits))
    tokens = used[:, 0]
    write_capture(run, routing, documents, tokens=tokens, domains=domains, shard_tokens=80)
    return moescope.routing(run, permutations=9, bootstrap=20, least_count=2)


def drawn(found):
    figures = chapter("routing").draw(found)
    for figure in figures:
        assert figure.specification()["datasets"]
        assert figure.title.endswith("?")
        assert min(len(figure.how_to_read), len(figure.limits)) > 40
    return [figure.name for figure in figures]


def test_every_table_is_drawn(tmp_path):
    assert drawn(result(tmp_path)) == NAMES


def test_both_stacks_are_drawn(tmp_path):
    decoder = result(tmp_path)
    tables = {
        name: pd.concat([table.assign(stack="encoder"), table])
        for name, table in decoder.tables.items()
    }
    names = drawn(dataclasses.replace(decoder, tables=tables))
    assert names == [f"{n}-encoder" for n in NAMES] + [f"{n}-decoder" for n in NAMES]


@pytest.mark.parametrize(
    ("options", "missing"),
    [
        ({"top_k": 1}, "routing-coactivation"),
        ({"layers": 1}, "routing-transitions"),
        ({"domains": ("a",)}, "routing-divergence"),
    ],
    ids=["one expert per token", "one layer", "one domain"],
)
def test_what_there_is_not_is_not_drawn(tmp_path, options, missing):
    assert drawn(result(tmp_path, **options)) == [name for name in NAMES if name != missing]


def test_many_experts_and_layers_are_drawn_in_part(tmp_path):
    assert drawn(result(tmp_path, experts=50, layers=8)) == NAMES


def test_results_of_earlier_versions_are_drawn():
    assert drawn(routing_result()) == [*NAMES[:3], "routing-divergence"]
