"""Losses of changed models: kept by name, read again, differences by document."""

from contextlib import contextmanager, nullcontext

import pandas as pd
import pytest

import moescope
from evaluate_zoo import scaled_blocks, small_corpus
from models_zoo import build
from moescope.analyses.losses import UNCHANGED, Losses, by_domain, entered
from moescope.errors import MoEScopeError


@pytest.fixture
def losses(tmp_path):
    corpus = small_corpus()
    return Losses(
        model=moescope.load(build("qwen2_moe")),
        batches=list(corpus.batches(None)),
        domains=corpus.domains,
        folder=tmp_path,
    )


def test_differences_are_those_of_compare(losses):
    change = scaled_blocks(losses.model, 0.3)
    found = by_domain(losses.of("scaled", change))
    table = moescope.evaluate.compare(
        losses.model, small_corpus(), {"scaled": change}, bootstrap=10
    )
    rows = table[table.intervention == "scaled"].set_index("domain")
    assert list(found) == list(rows.index)
    for domain, documents in found.items():
        tokens = documents["tokens"].sum()
        assert tokens == rows.n_tokens[domain]
        for name in ("loss", "difference"):
            assert documents[name].sum() / tokens == pytest.approx(rows[name][domain], rel=1e-5)


def test_what_is_kept_is_not_measured_again(losses):
    entries = []

    @contextmanager
    def noting():
        entries.append(1)
        yield

    first = losses.of_all({("a", 1): noting, ("b", 2): noting}, "test")
    again = losses.of_all({("a", 1): noting}, "test")
    assert len(entries) == 2
    pd.testing.assert_frame_equal(again["a", 1], first["a", 1])
    assert {path.name for path in losses.folder.iterdir()} == {
        f"{UNCHANGED}.parquet",
        "a-1.parquet",
        "b-2.parquet",
    }


@pytest.mark.parametrize("name", ["x" * 300, "a/b", "a\n"])
def test_names_that_files_cannot_have(losses, name):
    losses.of(name, nullcontext)
    losses.of(name + "x", nullcontext)
    assert len(list(losses.folder.glob("*.parquet"))) == 3


def test_a_damaged_file_is_named(losses):
    losses.of("a", nullcontext)
    (losses.folder / "a.parquet").write_bytes(b"")
    with pytest.raises(MoEScopeError, match=r"cannot read .*a.parquet.*Delete it"):
        losses.of("a", nullcontext)


def test_many_changes_as_one():
    order = []

    @contextmanager
    def noting(name):
        order.append(name)
        yield
        order.append(f"{name} ends")

    with entered([noting("a"), noting("b")]):
        order.append("both")
    assert order == ["a", "b", "both", "b ends", "a ends"]
