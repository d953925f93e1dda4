"""Capacity curves: the two summaries by hand, and curves whose shape is known."""

import math

import numpy as np
import pytest
import torch

from adapters_zoo import planted
from alignment_zoo import expert, normalised, samples
from moescope.alignment.capacity import Capacity, CapacityPoint, capacity_curve
from moescope.alignment.options import RANDOM_SEEDS, FitOptions, SolverOptions
from moescope.alignment.samples import Samples
from moescope.errors import AlignmentError

OPTIONS = FitOptions(solver=SolverOptions(steps=100, evaluate_every=50))


def curve(parameters, real, random):
    """A capacity of these FVUs, with two random targets around each of `random`."""
    points = []
    for i, number in enumerate(parameters):
        for kind, seed, fvu in (
            ("real", None, real[i]),
            ("random", 0, random[i] - 0.01),
            ("random", 1, random[i] + 0.01),
        ):
            about = {"kind": kind, "seed": seed, "rank": i, "train_fvu": fvu, "fvu": fvu}
            points.append(CapacityPoint(adapter_parameters=number, **about))
    return Capacity(points=tuple(points), self_fvu=math.nan)


def test_advantage_by_hand():
    """Parameters 1, 10, 1,000: the second step is twice as wide as the first."""
    found = curve([1, 10, 1_000], real=[0.8, 0.5, 0.1], random=[0.8, 0.7, 0.5])
    assert found.advantage == pytest.approx((0.1 * 1 + 0.3 * 2) / 3)
    assert curve([1, 10], [0.7, 0.5], [0.7, 0.5]).advantage == pytest.approx(0)


def test_parameters_saved_by_hand():
    """Random targets end at 0.5. The real one is there half of the way from 10 to 1,000."""
    found = curve([1, 10, 1_000], real=[0.9, 0.6, 0.4], random=[0.9, 0.8, 0.5])
    assert found.parameters_saved == pytest.approx(1_000 / 100)
    at_once = curve([1, 10, 1_000], real=[0.4, 0.3, 0.2], random=[0.9, 0.8, 0.5])
    assert at_once.parameters_saved == pytest.approx(1_000)
    assert math.isnan(curve([1, 10], real=[0.9, 0.8], random=[0.9, 0.5]).parameters_saved)


def capacity_of(case, target, ranks=(0, 4), **known):
    train, inner, held_out = case.parts()
    joined = Samples(
        torch.cat([train.inputs, inner.inputs]),
        torch.cat([train.outputs, inner.outputs]),
        torch.cat([train.documents, inner.documents]),
    )
    inputs = case.adapter(case.tokens.inputs)[:400]
    return capacity_curve(
        joined, held_out, target, target_inputs=inputs, ranks=ranks, options=OPTIONS, **known
    )


@pytest.fixture(scope="module")
def found():
    """Curves of a target that is the source up to a rank-2 change of input, and of strangers."""
    case = planted("low_rank", wide=8, rank=2)
    curves = {"planted": capacity_of(case, case.target, source=case.source)}
    for seed in range(20, 24):
        curves[f"stranger {seed}"] = capacity_of(
            case, expert(16, 8, seed=seed), target_name=f"stranger {seed}"
        )
    return curves


def fvus(capacity, kind, column="fvu"):
    rows = [row for row in capacity.table() if row["kind"] == kind]
    ranks = sorted({row["rank"] for row in rows})
    return np.array([[row[column] for row in rows if row["rank"] == rank] for rank in ranks])


def test_a_target_of_low_rank_change_is_reached_at_low_rank(found):
    real, random = fvus(found["planted"], "real")[:, 0], fvus(found["planted"], "random")
    assert real[1] < 0.05
    assert random.min() > 3 * real[1]
    assert found["planted"].parameters_saved > 2


def test_strangers_have_no_advantage(found):
    """On the average: one of them may do as much better as one random expert than others."""
    strangers = [found[name].advantage for name in found if name != "planted"]
    assert abs(np.mean(strangers)) < 0.15
    assert found["planted"].advantage > max(0.3, *strangers)


def test_the_full_adapter_finds_a_hidden_rotation(found):
    """Which no adapter of low rank can undo, so that warm starts alone do not get there."""
    assert found["planted"].self_fvu < 0.1
    assert math.isnan(found["stranger 20"].self_fvu)


def test_training_errors_never_rise_with_the_rank(found):
    for capacity in found.values():
        for kind, number in (("real", 1), ("random", RANDOM_SEEDS)):
            errors = fvus(capacity, kind, "train_fvu")
            assert errors.shape == (3, number)
            assert (np.diff(errors, axis=0) <= 0).all()


def test_rows_say_what_they_are(found):
    rows = found["planted"].table()
    assert [row["rank"] for row in rows[:: RANDOM_SEEDS + 1]] == [0, 4, 16]
    numbers = [row["adapter_parameters"] for row in rows[:: RANDOM_SEEDS + 1]]
    assert numbers == [4 * 16, 2 * 4 * 16 + 4 * 16, 16 * 16 + 3 * 16]
    assert [(row["kind"], row["seed"]) for row in rows[: RANDOM_SEEDS + 1]] == [
        ("real", None),
        *(("random", j) for j in range(RANDOM_SEEDS)),
    ]


def test_ranks_that_cost_as_much_as_the_full_matrix_are_left_out():
    source = expert(8, 12, seed=1)
    train, held_out = samples(source, normalised(200, 8))
    options = FitOptions(solver=SolverOptions(steps=2))
    capacity = capacity_curve(
        train, held_out, expert(8, 20, seed=2), source=source, ranks=(4, 1, 3, 64), options=options
    )
    assert sorted({row["rank"] for row in capacity.table()}) == [1, 3, 8]
    assert math.isfinite(capacity.self_fvu)  # of another width than the target


def test_a_curve_needs_tokens_and_outputs_that_vary():
    x = normalised(80)
    few = Samples(x[:40], x[:40])
    with pytest.raises(AlignmentError, match="too few tokens for a capacity curve"):
        capacity_curve(few, few, expert())
    constant = Samples(x, torch.ones(80, 16))
    with pytest.raises(AlignmentError, match="do not vary"):
        capacity_curve(constant, constant, expert())
