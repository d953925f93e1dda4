"""Many pairs at once: what they share, what they must not, and going on after an interruption."""

import gc
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch

from alignment_zoo import expert, normalised, samples
from moescope.alignment import candidates
from moescope.alignment.controls import all_random, same_output_space
from moescope.alignment.fit import fit
from moescope.alignment.options import FitOptions, SolverOptions
from moescope.alignment.outcomes import Outcome, OutcomeFolder
from moescope.alignment.pairs import fit_pairs
from moescope.errors import AlignmentError

OPTIONS = FitOptions(solver=SolverOptions(steps=10), seed=7)
OF_THE_COMPANY = {
    *("fvu_random", "fvu_random_sd", "fvu_random_all"),
    *("score", "score_low", "score_high", "status"),
}
"""Columns that the other targets of its shape may change."""


def problem(targets=1, hidden=16, wide=24):
    source = expert(hidden, wide, seed=1)
    train, held_out = samples(source, normalised(400, hidden), number=160)
    experts = {f"target {seed}": expert(hidden, wide, seed=seed) for seed in range(3, 3 + targets)}
    # Two shapes, so that there are chunks of both.
    experts["wider"] = expert(hidden, wide + 8, seed=2)
    inputs = {name: normalised(200, hidden, seed=9 + i) for i, name in enumerate(experts)}
    return (
        train,
        held_out,
        {
            "targets": experts,
            "source": source,
            "target_inputs": inputs,
        },
    )


def of_one_shape():
    """Twelve fits: one target, five random ones of either kind, the ceiling."""
    train, held_out, arguments = problem()
    return train, held_out, arguments | {"targets": {"target 3": arguments["targets"]["target 3"]}}


def rows(found):
    return {name: result.row() for name, result in found.items()}


def with_chunks(chunk_bytes):
    return FitOptions(solver=SolverOptions(steps=10, chunk_bytes=chunk_bytes), seed=7)


@pytest.fixture
def threads():
    """Put the number of threads back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def differences(row, other):
    """Columns that differ by more than rounding: other batches and threads sum in other orders."""

    def same(value, other):
        if isinstance(value, float):
            return other == pytest.approx(value, rel=1e-4, abs=1e-7, nan_ok=True)
        return other == value

    return {column for column in row if not same(row[column], other[column])}


def assert_close(rows, others):
    assert {name: differences(row, others[name]) for name, row in rows.items()} == {
        name: set() for name in rows
    }


def test_the_same_seed_gives_the_same_numbers_in_any_chunks(threads):
    train, held_out, arguments = problem()
    found = []
    for chunk_bytes, number in ((700_000, 1), (2**30, 1), (2**20, 2)):
        threads(number)
        options = with_chunks(chunk_bytes)
        found.append(rows(fit_pairs(train, held_out, **arguments, options=options)))
    for other in found[1:]:
        assert_close(found[0], other)


def test_the_published_loop_gives_the_same_numbers_in_any_chunks():
    train, held_out, arguments = of_one_shape()
    found = []
    for chunk_bytes in (1, 2**30):
        options = replace(with_chunks(chunk_bytes), protocol="published")
        found.append(rows(fit_pairs(train, held_out, **arguments, options=options)))
    assert_close(*found)


def test_the_company_of_a_target_changes_only_the_all_random_null():
    train, held_out, arguments = problem(targets=2)
    together = rows(fit_pairs(train, held_out, **arguments, options=OPTIONS))
    for name, alone_of_its_shape in (("target 3", False), ("wider", True)):
        alone = {"targets": {name: arguments["targets"][name]}}
        row = rows(fit_pairs(train, held_out, **(arguments | alone), options=OPTIONS))[name]
        changed = differences(row, together[name])
        assert changed <= (set() if alone_of_its_shape else OF_THE_COMPANY)
        assert ("fvu_random_all" in changed) != alone_of_its_shape
        null = row["fvu_random_all"]
        assert null == pytest.approx(together[name]["fvu_random_all"], abs=0.15)


def test_neither_order_nor_unknown_inputs_of_others_change_a_target():
    """Each is held against a ceiling and random targets that know as much of inputs as it does."""
    train, held_out, arguments = problem()
    targets, inputs = arguments["targets"], arguments["target_inputs"]
    targets["unknown"] = expert(seed=4)
    found = rows(fit_pairs(train, held_out, **arguments, options=OPTIONS))
    turned = arguments | {"targets": dict(reversed(targets.items()))}
    assert_close(rows(fit_pairs(train, held_out, **turned, options=OPTIONS)), found)
    for name in ("target 3", "unknown"):
        known = {known: x for known, x in inputs.items() if known == name}
        own = {"targets": {name: targets[name]}, "target_inputs": known}
        alone = rows(fit_pairs(train, held_out, **(arguments | own), options=OPTIONS))
        assert_close(alone, found)
    assert found["unknown"]["fvu_self"] != found["target 3"]["fvu_self"]


def test_one_pair_is_a_pair_of_many():
    train, held_out, arguments = problem()
    name, target = "target", arguments["targets"]["target 3"]
    inputs = arguments["target_inputs"]["target 3"]
    single = fit(
        train,
        held_out,
        target,
        source=arguments["source"],
        target_inputs=inputs,
        seed=7,
        solver=OPTIONS.solver,
    )
    given = {"targets": {name: target}, "target_inputs": {name: inputs}}
    many = fit_pairs(train, held_out, **(arguments | given), options=OPTIONS)
    assert single.row() == many[name].row()


def test_random_targets_live_no_longer_than_their_chunk(monkeypatch):
    """Two targets bring twenty random ones; with chunks of one fit, few exist at a time."""
    alive, most = weakref.WeakSet(), 0

    def counted(make):
        def made(*arguments):
            nonlocal most
            gc.collect()
            found = make(*arguments)
            alive.update(e.up for e in found)
            most = max(most, len(alive))
            return found

        return made

    for make in (same_output_space, all_random):
        monkeypatch.setattr(candidates, make.__name__, counted(make))
    train, held_out, arguments = problem(hidden=8, wide=8)
    solver = SolverOptions(steps=1, chunk_bytes=1)
    done = []
    fit_pairs(
        train,
        held_out,
        **arguments,
        options=FitOptions(solver=solver),
        progress=lambda *now: done.append(now),
    )
    assert 5 <= most <= 10
    assert done[-1] == (2 * 6 + 2 * 5 + 1,) * 2
    assert [n for n, _ in done] == sorted({n for n, _ in done})


class Interrupted(Exception):  # noqa: N818
    """What an interruption raises here."""


@pytest.fixture(scope="module")
def uninterrupted():
    train, held_out, arguments = of_one_shape()
    return fit_pairs(train, held_out, **arguments, options=with_chunks(1_000_000))


@pytest.mark.parametrize(("on_disk", "number"), [(False, 2), (True, 1)])
def test_an_interrupted_call_goes_on_where_it_stopped(
    on_disk, number, uninterrupted, threads, tmp_path
):
    threads(number)
    train, held_out, arguments = of_one_shape()
    options, expected = with_chunks(1_000_000), uninterrupted
    kept = OutcomeFolder(tmp_path / "fits") if on_disk else {}

    def interrupt(done, total):
        if done > total // 2:
            raise Interrupted

    with pytest.raises(Interrupted):
        fit_pairs(train, held_out, **arguments, options=options, outcomes=kept, progress=interrupt)
    before, counted = set(kept), []
    assert 6 <= len(before) < 12
    found = fit_pairs(
        train,
        held_out,
        **arguments,
        options=options,
        outcomes=kept,
        progress=lambda *now: counted.append(now),
    )
    assert counted[0][0] > len(before)
    assert counted[-1] == (12, 12)
    assert before < set(kept)
    assert_close(rows(found), rows(expected))
    for name, result in found.items():
        assert [p.step for p in result.curve] == [p.step for p in expected[name].curve]
        for part, tensor in result.adapter.tensors().items():
            torch.testing.assert_close(tensor, expected[name].adapter.tensors()[part])


def test_a_finished_call_fits_nothing(tmp_path):
    train, held_out, arguments = problem()
    kept = OutcomeFolder(tmp_path)
    first = fit_pairs(train, held_out, **arguments, options=OPTIONS, outcomes=kept)
    counted = []
    again = fit_pairs(
        train,
        held_out,
        **arguments,
        options=OPTIONS,
        outcomes=OutcomeFolder(tmp_path),
        progress=lambda *now: counted.append(now),
    )
    assert counted == []
    assert rows(first) == rows(again)


def test_outcomes_come_back_from_the_disk(tmp_path):
    folder = OutcomeFolder(tmp_path / "new")
    assert len(folder) == 0
    assert list(folder) == []
    errors = np.array([0.1, 1e-300, np.inf])
    folder["same output space", "a/b: ü", 3] = Outcome(errors=errors)
    folder["self",] = Outcome(errors=errors[:1])
    assert set(folder) == {("same output space", "a/b: ü", 3), ("self",)}
    assert ("self",) in folder
    assert "self" not in folder
    again = OutcomeFolder(tmp_path / "new")["same output space", "a/b: ü", 3]
    assert np.array_equal(again.errors, errors)
    assert again.fit is None
    del folder["self",]
    assert set(folder) == {("same output space", "a/b: ü", 3)}
    for missing in ("get", "delete"):
        with pytest.raises(KeyError):
            folder["self",] if missing == "get" else folder.pop(("self",))
    (path,) = (tmp_path / "new").glob("*.json")
    path.write_text("{")
    with pytest.raises(AlignmentError, match="cannot read the fit"):
        folder["same output space", "a/b: ü", 3]
