"""Answers that are known beforehand: each is shown to be within reach, then looked for."""

import math

import pytest
import torch
from jaxtyping import config

from alignment_zoo import (
    documents,
    expert,
    ill_conditioned,
    nested_experts,
    normalised,
    outlier_norm,
    permutation,
    reading,
    reparametrised,
    rotation_keeping_the_mean,
    samples,
    trained_expert,
)
from moescope.alignment.controls import same_output_space
from moescope.alignment.fit import fit
from moescope.alignment.options import FitOptions, SolverOptions
from moescope.alignment.pairs import fit_pairs
from moescope.alignment.samples import Samples
from moescope.experts.adapter import Adapter

HIDDEN = 16
QUICK = SolverOptions(steps=60)


def plain_problem(turn, wide, seed):
    """Source, its inputs, the same function on turned inputs, these inputs, the adapter."""
    source, x = expert(HIDDEN, wide, seed), normalised(1_200, seed=seed)
    ones, zeros = torch.ones(HIDDEN), torch.zeros(HIDDEN)
    experts = (reparametrised(source, turn), expert(HIDDEN, wide, seed + 10_000))
    return source, x, *experts, x @ turn.T, Adapter(turn, zeros, ones, zeros)


def outlier_problem(turn, wide, seed):
    """The same where both inputs have outliers and an offset; they need not be the same ones."""
    inner, n = expert(HIDDEN, wide, seed), ill_conditioned(seed=seed, law=seed)
    gain, shift = outlier_norm(seed=seed)
    other_gain, other_shift = outlier_norm(seed=seed + 500)
    target = reading(reparametrised(inner, turn), other_gain, other_shift)
    stranger = reading(expert(HIDDEN, wide, seed + 10_000), other_gain, other_shift)
    inputs = ill_conditioned(400, seed=seed + 1_000, law=seed) @ turn.T * other_gain + other_shift
    adapter = Adapter(turn / gain, -turn @ (shift / gain), other_gain, other_shift)
    return reading(inner, gain, shift), n * gain + shift, target, stranger, inputs, adapter


CASES = {
    "rotation, more neurons than dimensions": (plain_problem, rotation_keeping_the_mean, 24, 100),
    "permutation, fewer neurons": (plain_problem, permutation, 8, 150),
    "rotation, fewer neurons, outliers": (outlier_problem, rotation_keeping_the_mean, 8, 300),
    "permutation, more neurons, outliers": (outlier_problem, permutation, 24, 300),
}
"""How the source is turned, its neurons, and the steps that its fits get."""


@pytest.fixture
def shapes_checked_once(seed):
    """The checks of shapes take half of the time: the first seed has them for all."""
    config.update("jaxtyping_disable", seed > 0)
    yield
    config.update("jaxtyping_disable", False)


@pytest.mark.slow
@pytest.mark.usefixtures("shapes_checked_once")
@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("case", CASES)
def test_a_reparametrised_source_is_found(case, seed):
    problem, turn, wide, steps = CASES[case]
    turned = turn(HIDDEN, seed=seed + 100)
    source, x, same, stranger, inputs, adapter = problem(turned, wide, seed)
    torch.testing.assert_close(same(adapter(x)), source(x), atol=2e-3, rtol=2e-3)  # within reach
    train, held_out = samples(source, x)
    targets = {
        "same": same,
        "same output space": same_output_space(same, seed, "planted")[0],
        "stranger": stranger,
    }
    found = fit_pairs(
        train,
        held_out,
        targets,
        target_inputs=dict.fromkeys(targets, inputs),
        options=FitOptions(controls=False, solver=SolverOptions(steps=steps)),
    )
    assert found["same"].fvu <= 0.05
    assert found["same"].fvu == min(result.fvu for result in found.values())


def test_strangers_end_inside_the_null():
    """A stranger is one more random expert with its down projection: Gaussian rows of any norm.

    So it is as likely to be at any rank among its own five: 2.5 on average, with a standard error
    of 1.71 / sqrt(16) for sixteen of them. An interval above zero comes in 2.5% of cases at most.
    """
    source = expert(seed=1)
    train, held_out = samples(source, normalised(1_000))
    targets = {f"stranger {seed}": expert(seed=seed) for seed in range(50, 66)}
    outcomes = {}
    found = fit_pairs(
        train,
        held_out,
        targets,
        source=source,
        target_inputs=dict.fromkeys(targets, normalised(300, seed=9)),
        options=FitOptions(solver=QUICK),
        outcomes=outcomes,
    )
    errors = {label: outcome.errors.sum() for label, outcome in outcomes.items()}
    ranks = [
        sum(errors["same output space", name, j] < errors["pair", name] for j in range(5))
        for name in targets
    ]
    assert abs(sum(ranks) / 16 - 2.5) < 3 * 1.71 / 16**0.5
    assert {result.status for result in found.values()} == {"ok"}
    # Three or more of sixteen in less than 1 of 100.
    assert sum(result.score_low > 0 for result in found.values()) <= 2


@pytest.mark.parametrize("seed", range(3))
def test_a_one_way_relation_is_reported_one_way(seed):
    small, large = nested_experts(seed=seed)
    turn = rotation_keeping_the_mean(seed=seed + 1)
    x = normalised(1_200, seed=seed)
    turned, x_turned = reparametrised(small, turn), x @ turn.T
    first = (torch.arange(HIDDEN) < HIDDEN // 2).float()
    adapter = Adapter(turn.T, torch.zeros(HIDDEN), first, torch.zeros(HIDDEN))
    torch.testing.assert_close(large(adapter(x_turned)), turned(x_turned), atol=1e-3, rtol=1e-3)

    def score(source, inputs, target, target_inputs):
        train, held_out = samples(source, inputs)
        solver = SolverOptions(steps=150)
        return fit(
            train, held_out, target, source=source, target_inputs=target_inputs, solver=solver
        )

    there = score(turned, x_turned, large, x[:400])
    back = score(large, x, turned, x_turned[:400])
    assert there.fvu <= 0.05
    assert there.score > 0.9
    assert back.fvu_floor > 0.4  # of the variance is where the small one cannot write
    assert back.fvu >= back.fvu_floor - 1e-4
    assert back.score < 0.5
    assert back.score_high < there.score


@pytest.mark.slow
def test_sharing_the_output_space_alone_is_no_advantage():
    """Random experts with a trained one's down projection, among random experts of either kind.

    They are draws of the first kind, so each is as likely to be at any rank among its own five:
    2.5 on average, with a standard error of 1.71 / sqrt(30) for thirty of them. Against the second
    kind, which does not share the output space, their advantage is plain.
    """
    own, others, above = [], [], 0
    for seed in range(7, 13):
        source = trained_expert(seed=seed)
        train, held_out = samples(source, normalised(1_000, seed=seed))
        targets = {f"same {j}": e for j, e in enumerate(same_output_space(source, 0, "planted"))}
        outcomes = {}
        found = fit_pairs(
            train,
            held_out,
            targets,
            source=source,
            target_inputs=dict.fromkeys(targets, normalised(300, seed=9)),
            options=FitOptions(solver=QUICK),
            outcomes=outcomes,
        )
        errors = {label: outcome.errors.sum() for label, outcome in outcomes.items()}
        for name, result in found.items():
            pair = errors["pair", name]
            own.append(sum(errors["same output space", name, j] < pair for j in range(5)))
            others.append(sum(errors["all random", "same 0", j] < pair for j in range(5)))
            above += result.score_low > 0
    assert abs(sum(own) / 30 - 2.5) < 3 * 1.71 / 30**0.5
    assert sum(others) / 30 < 0.5
    assert above <= 3  # 2.5% of thirty: four or more in less than 1 of 100


DEGENERATE = {
    "constant outputs": lambda x, y: (x, torch.ones_like(y)),
    "three tokens": lambda x, y: (x[:3], y[:3]),
    "duplicated tokens": lambda x, y: (x[:10].repeat(40, 1), y[:10].repeat(40, 1)),
    "one token again and again": lambda x, y: (x[:1].repeat(400, 1), y),
    "constant inputs but one": lambda x, y: (torch.cat([x[:, :1], 0 * x[:, 1:]], 1), y),
    "one output token is everything": lambda x, y: (x, torch.cat([1e6 * y[:1], y[1:]])),
    "tiny outputs": lambda x, y: (x, 1e-6 * y),
    "huge inputs": lambda x, y: (1e3 * x, 1e6 * y),
}


@pytest.mark.parametrize("form", ["layer_norm", "linear", "orthogonal", "low_rank", "scale"])
@pytest.mark.parametrize("case", DEGENERATE)
def test_degenerate_tokens_give_finite_numbers_or_a_named_status(case, form):
    source = expert(seed=1)
    x = normalised(400)
    x, y = DEGENERATE[case](x, source(x))
    everything = Samples(x, y, documents(len(x), min(160, len(x))))
    held = everything.documents % 4 == 0
    result = fit(
        everything.where(~held),
        everything.where(held),
        expert(seed=3),
        source=source,
        form=form,
        rank=2,
        target_inputs=normalised(100, seed=5),
        solver=SolverOptions(steps=5, evaluate_every=5),
    )
    if result.status in ("constant_outputs", "too_few_tokens"):
        assert result.adapter is None
        return
    missing = {name for name, value in result.row().items() if value != value}
    if result.status == "undefined":
        missing -= {"score", "score_low", "score_high"}
    assert not missing
    assert all(math.isfinite(v) for k, v in result.row().items() if k.startswith("fvu"))
    assert all(bool(t.isfinite().all()) for t in result.adapter.tensors().values())


ALIKE = {
    "one token again and again": lambda x: x[:1].repeat(len(x), 1),
    "zeros": torch.zeros_like,
    "one dimension moves": lambda x: torch.cat([x[:, :1], 0 * x[:, 1:]], 1),
    "one token but for a tenth": lambda x: torch.cat([x[:1].repeat(180, 1), x[:20]]),
}


@pytest.mark.parametrize("form", ["layer_norm", "low_rank"])
@pytest.mark.parametrize("case", ALIKE)
def test_target_inputs_that_hardly_vary_give_finite_numbers(case, form):
    """Where they do not vary at all they are as good as unknown."""
    source = expert(seed=1)
    train, held_out = samples(source, normalised(400))
    inputs = ALIKE[case](normalised(200, seed=5))
    arguments = {"source": source, "form": form, "rank": 2, "solver": SolverOptions(steps=2)}
    row = fit(train, held_out, expert(seed=3), target_inputs=inputs, **arguments).row()
    missing = {name for name, value in row.items() if value != value}
    varies = bool((inputs != inputs[0]).any())
    assert missing == (set() if varies else {"kl_before", "kl_after", "mmd_before", "mmd_after"})
    numbers = [value for value in row.values() if isinstance(value, float) and value == value]
    assert all(math.isfinite(value) for value in numbers)
    if not varies:
        assert str(row) == str(fit(train, held_out, expert(seed=3), **arguments).row())
