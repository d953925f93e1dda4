"""Learning curves: nested parts of the training tokens, on the same held-out tokens."""

import pytest
import torch

from alignment_zoo import documents, expert, normalised, samples
from moescope.alignment.learning import learning_curve
from moescope.alignment.options import FitOptions, SolverOptions
from moescope.alignment.pairs import fit_pairs
from moescope.alignment.randomness import generator
from moescope.alignment.samples import Samples
from moescope.errors import OptionError

OPTIONS = FitOptions(solver=SolverOptions(steps=20))


@pytest.fixture(scope="module")
def problem():
    source = expert(seed=1)
    train, held_out = samples(source, normalised(800), number=160)
    return train, held_out, {"same": source, "other": expert(seed=3)}, source


def test_parts_are_nested_and_of_whole_documents():
    x = torch.arange(100.0)[:, None].expand(-1, 4).contiguous()
    sizes = torch.tensor([40, 1, 9, 20, 30])
    everything = Samples(x, x, torch.arange(5).repeat_interleave(sizes))
    last: set[float] = set()
    for tokens in (1, 20, 50, 99, 100):
        part = everything.first(tokens, generator(0, "test"))
        found = set(part.inputs[:, 0].tolist())
        assert last <= found
        last = found
        for document in range(5):
            inside = (part.documents == document).sum()
            assert inside in (0, sizes[document])
        assert torch.equal(part.inputs, x[[int(t) for t in sorted(found)]])
        nearest = min(abs(tokens - size) for size in _prefixes(everything))
        assert abs(tokens - len(part)) == nearest
    assert last == set(range(100))
    unknown = Samples(x, x).first(37, generator(0, "test"))
    assert len(unknown) == 37


def _prefixes(everything):
    """Numbers of tokens of the first document, the first two, and so on."""
    order = torch.randperm(5, generator=generator(0, "test"))
    return torch.bincount(everything.documents)[order].cumsum(0).tolist()


def test_the_curve_ends_in_the_fit_on_everything(problem):
    train, held_out, targets, source = problem
    rows = learning_curve(train, held_out, targets, source=source, options=OPTIONS)
    tokens = [row["n_train"] for row in rows if row["target"] == "same"]
    assert tokens == [75, 150, 300, 600]
    assert {row["n_val"] for row in rows} == {len(held_out)}
    assert [row["form"] for row in rows if row["target"] == "same"][-1] == "layer_norm"
    # The linear map is solved exactly: twenty steps of a fit are too few to tell the tokens apart.
    linear = [row["fvu_linear"] for row in rows if row["target"] == "same"]
    assert linear[-1] < linear[0]
    for column in ("fvu_linear", "fvu_random", "fvu_self", "score", "status", "fvu_low"):
        assert column in rows[0]
    everything = fit_pairs(train, held_out, targets, source=source, options=OPTIONS)
    for row in rows[-2:]:
        name = row.pop("target")
        assert row == everything[name].row()


def test_wanted_sizes_are_kept_in_order_and_fitted_once(problem):
    train, held_out, targets, _ = problem
    quick = FitOptions(controls=False, solver=SolverOptions(steps=2))
    arguments = {"targets": {"other": targets["other"]}, "options": quick}
    rows = learning_curve(train, held_out, sizes=[300, 100, 101], **arguments)
    assert [row["n_train"] for row in rows] == [100, 300]
    few = learning_curve(train, held_out, sizes=[20], **arguments)
    assert [row["status"] for row in few] == ["too_few_tokens"]
    for size in (0, len(train) + 1):
        with pytest.raises(OptionError, match="part of the training tokens"):
            learning_curve(train, held_out, sizes=[size], **arguments)


def test_a_single_document_gives_a_single_point(problem):
    train, held_out, targets, _ = problem
    one = Samples(train.inputs, train.outputs, documents(len(train), 1))
    quick = FitOptions(controls=False, solver=SolverOptions(steps=2))
    rows = learning_curve(one, held_out, {"other": targets["other"]}, options=quick)
    assert [row["n_train"] for row in rows] == [len(train)]
