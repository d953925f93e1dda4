"""What a fit finds: planted answers, controls, statuses, limits."""

import math

import pytest
import torch
from torch.nn.functional import layer_norm

from alignment_zoo import (
    documents,
    expert,
    normalised,
    reparametrised,
    rotation_keeping_the_mean,
    samples,
)
from moescope.alignment.controls import same_output_space
from moescope.alignment.fit import fit
from moescope.alignment.options import FitOptions, SolverOptions
from moescope.alignment.pairs import fit_pairs
from moescope.alignment.samples import Samples
from moescope.alignment.solver import Clock
from moescope.errors import AlignmentError, OptionError
from moescope.experts.weights import ExpertWeights

QUICK = SolverOptions(steps=60)


@pytest.fixture(scope="module")
def planted():
    """One target is the source behind a hidden rotation; the others are strangers."""
    source, rotation = expert(seed=1), rotation_keeping_the_mean(seed=2)
    x = normalised()
    targets = {"stranger": expert(seed=3), "same": reparametrised(source, rotation)}
    targets["same down"] = same_output_space(source, 0, "planted")[0]
    inputs = {"same": normalised(400, seed=0) @ rotation.T}
    inputs |= {name: normalised(400, seed=9) for name in ("stranger", "same down")}
    train, held_out = samples(source, x)
    found = fit_pairs(train, held_out, targets, source=source, target_inputs=inputs)
    return source, x, targets, found


def test_the_planted_rotation_is_possible(planted):
    source, x, targets, _ = planted
    rotation = rotation_keeping_the_mean(seed=2)
    moved = layer_norm(x @ rotation.T, (16,))
    torch.testing.assert_close(targets["same"](moved), source(x), atol=1e-4, rtol=1e-3)


def test_the_planted_target_is_found_and_is_the_best(planted):
    found = planted[3]
    assert found["same"].fvu < 0.02
    assert found["same"].fvu == min(r.fvu for r in found.values())
    assert found["same"].score_low > 0.5
    assert found["same"].status == "ok"
    assert found["same"].fvu_self < 0.05
    assert found["same"].converged
    assert found["same"].row()["self_converged"]
    assert not found["same"].constant_kept


def test_strangers_stay_within_the_null(planted):
    for name in ("stranger", "same down"):
        result = planted[3][name]
        assert result.score < 0.3, name
        assert abs(result.fvu - result.fvu_random) < 4 * result.fvu_random_sd + 0.05


def test_numbers_belong_together(planted):
    source, x, targets, found = planted
    _, held_out = samples(source, x)
    train, _ = samples(source, x)
    for name, result in found.items():
        predicted = targets[name](result.adapter(held_out.inputs))
        error = (predicted - held_out.outputs).square().sum(1).mean()
        variance = (held_out.outputs - train.outputs.mean(0)).square().sum(1).mean()
        assert result.fvu == pytest.approx(float(error / variance), rel=1e-4)
        assert result.mse_sum == pytest.approx(float(error), rel=1e-4)
        assert result.mse_mean == pytest.approx(result.mse_sum / 16)
        assert result.fvu_floor <= result.fvu + 1e-6
        assert result.fvu_low <= result.fvu <= result.fvu_high
        random = min(result.fvu_random_down, result.fvu_random_all)
        null = min(random, result.fvu_linear, 1)
        score = (null - result.fvu) / (null - result.fvu_self)
        assert result.score == pytest.approx(score, rel=1e-6)
        assert result.score_low <= result.score <= result.score_high
        kinds = (result.fvu_random_down + result.fvu_random_all) / 2
        assert result.fvu_random == pytest.approx(kinds)
        assert result.n_train + result.n_val == len(x)
        assert result.n_documents == 40
        assert [p.step for p in result.curve][:2] == [0, 20]
        assert not [name for name, value in result.row().items() if value != value]


def test_seeds_decide_and_the_global_random_state_is_left_alone():
    source, target = expert(seed=1), expert(seed=3)
    train, held_out = samples(source, normalised(600))
    few, before = SolverOptions(steps=10), torch.random.get_rng_state()
    first, again, other = (
        fit(train, held_out, target, source=source, seed=seed, solver=few) for seed in (0, 0, 1)
    )
    assert torch.equal(before, torch.random.get_rng_state())
    assert first.row() == again.row()
    assert first.fvu != other.fvu
    assert first.fvu_random != other.fvu_random


def test_never_above_the_constant_adapter():
    """Outputs without any relation to the inputs: whatever is learned is noise."""
    x = normalised(800)
    y = torch.randn(800, 16, generator=torch.Generator().manual_seed(1))
    everything = Samples(x, y, documents(800, 80))
    last = everything.documents >= 40
    result = fit(everything.where(~last), everything.where(last), expert(seed=3), controls=False)
    assert result.fvu <= result.fvu_constant + 1e-6
    assert result.row()["constant_kept"]
    assert result.steps > 0
    assert not result.converged
    assert result.status == "no_controls"


def test_an_exactly_linear_source_is_found_by_the_linear_control():
    x = normalised(800)
    matrix = torch.randn(16, 16, generator=torch.Generator().manual_seed(0))
    everything = Samples(x, x @ matrix + 1, documents(800, 80))
    last = everything.documents >= 40
    train, held_out = everything.where(~last), everything.where(last)
    result = fit(train, held_out, expert(seed=3), source=expert(seed=4), solver=QUICK)
    assert result.fvu_linear < 1e-4
    assert math.isnan(result.score)
    assert result.status == "undefined"


def test_budget_is_kept():
    source = expert(32, 48, seed=1)
    train, held_out = samples(source, normalised(1_000, 32))
    long = SolverOptions(steps=1_000_000, patience=1_000_000)
    result = fit(
        train, held_out, expert(32, 48, seed=3), source=source, budget_seconds=1.0, solver=long
    )
    assert 0 < result.steps < 100_000
    # One step over it at most, and all fits of the call share it.
    assert result.curve[-1].seconds < 1.3
    assert math.isfinite(result.fvu)


def test_nothing_has_converged_without_a_step():
    source = expert(seed=1)
    train, held_out = samples(source, normalised(600))
    result = fit(train, held_out, expert(seed=3), source=source, budget_seconds=1e-9)
    assert result.steps == 0
    assert result.status == "not_settled"
    assert not result.converged
    assert not result.self_converged
    assert math.isfinite(result.fvu)
    unlimited = fit(train, held_out, expert(seed=3), controls=False, solver=QUICK)
    assert not unlimited.self_converged  # there is none


@pytest.mark.parametrize(
    ("steps", "in_time", "settled"), [(60, 10, False), (60, 50, True), (10, 99, True)]
)
def test_a_fit_that_ran_out_of_time_has_settled_after_enough_steps(
    monkeypatch, steps, in_time, settled
):
    """Any change counts as little here, but ten steps of sixty are too few to tell."""
    monkeypatch.setattr(Clock, "share", lambda _, step: min(1.0, step / min(steps, in_time)))
    source = expert(seed=1)
    train, held_out = samples(source, normalised(600))
    solver = SolverOptions(steps=steps, patience=50, settled=1.0)
    known = train.inputs[:300]
    result = fit(train, held_out, source, source=source, target_inputs=known, solver=solver)
    assert result.steps == min(steps, in_time)
    assert (result.converged, result.self_converged) == (settled, settled)
    assert result.status == ("ok" if settled else "not_settled")


def test_too_few_target_inputs_are_as_good_as_none():
    source, target = expert(seed=1), expert(seed=3)
    train, held_out = samples(source, normalised(600))
    few = SolverOptions(steps=5)
    rows = [
        fit(train, held_out, target, source=source, target_inputs=inputs, solver=few).row()
        for inputs in (None, normalised(1), normalised(63), normalised(64))
    ]
    assert rows[0] == rows[1] == rows[2] != rows[3]


def test_three_tokens():
    source = expert(seed=1)
    x = normalised(3)
    tiny = Samples(x, source(x), torch.arange(3))
    result = fit(tiny, tiny, expert(seed=3), source=source)
    assert result.status == "too_few_tokens"
    assert result.adapter is None
    assert math.isnan(result.fvu)
    assert (result.n_train, result.n_val, result.seed) == (3, 3, 0)
    assert "not available" in result._repr_html_()


def test_constant_outputs():
    x = normalised(400)
    same = Samples(x, torch.ones(400, 16))
    result = fit(same, same, expert(seed=3), source=expert(seed=1))
    assert result.status == "constant_outputs"
    assert math.isnan(result.fvu)


def test_duplicated_tokens_give_finite_numbers():
    source = expert(seed=1)
    x = normalised(10).repeat(60, 1)
    train, held_out = samples(source, x)
    result = fit(train, held_out, expert(seed=3), source=source, solver=QUICK)
    assert all(
        math.isfinite(v) for k, v in result.row().items() if k.startswith("fvu") or k == "mse_sum"
    )


def test_statuses_in_their_order():
    source, target = expert(seed=1), expert(seed=3)
    train, held_out = samples(source, normalised(600))
    unknown = Samples(held_out.inputs, held_out.outputs)
    quick = SolverOptions(steps=20)
    few = fit(train, unknown, target, source=source, solver=quick)
    assert (few.status, few.n_documents) == ("few_documents", 0)
    assert math.isnan(few.score_low)
    assert math.isnan(few.fvu_low)
    assert math.isfinite(few.score)
    blind = fit(train, held_out, target, solver=quick)
    assert blind.status == "no_ceiling"
    assert math.isnan(blind.score)
    assert math.isfinite(blind.fvu_low)
    wide = expert(64, 24, seed=1)
    train, held_out = samples(wide, normalised(300, 64))
    short = fit(train, held_out, expert(64, 24, seed=3), source=wide, solver=quick)
    assert short.status in ("underdetermined", "undefined")


def test_too_few_tokens_for_a_full_matrix_get_a_low_rank_one():
    """150 tokens at 64 dimensions: rank 18, for the controls too, and the columns say so."""
    source, target = expert(64, 24, seed=1), expert(64, 24, seed=3)
    train, held_out = samples(source, normalised(200, 64))
    assert len(train) == 150
    known = normalised(200, 64, seed=9)
    arguments = {"source": source, "target_inputs": known, "solver": SolverOptions(steps=20)}
    short = fit(train, held_out, target, **arguments)
    told = fit(train, held_out, target, form="low_rank", rank=18, **arguments)
    assert (short.form, short.rank, short.adapter.form, short.adapter.rank) == (
        *("low_rank", 18),
        *("low_rank", 18),
    )
    apart = {"status": None, "underdetermined": None}
    assert short.row() | apart == told.row() | apart
    assert (short.status, told.status) == ("underdetermined", "ok")
    assert (short.underdetermined, told.underdetermined) == (True, False)
    assert short.adapter_parameters == short.adapter.num_parameters == 2 * 18 * 64 + 4 * 64
    assert short.parameters_share == short.adapter_parameters / (3 * 24 * 64)
    published = fit(train, held_out, target, protocol="published", **arguments)
    assert (published.form, published.rank, published.adapter.form) == (
        "layer_norm",
        64,
        "layer_norm",
    )
    assert published.status in ("underdetermined", "undefined")


@pytest.mark.parametrize("form", ["layer_norm", "linear", "orthogonal", "low_rank", "scale"])
def test_the_columns_count_what_the_adapter_holds(form):
    source = expert(seed=1)
    train, held_out = samples(source, normalised(200))
    solver = SolverOptions(steps=5)
    result = fit(train, held_out, expert(seed=3), form=form, rank=3, controls=False, solver=solver)
    assert result.adapter_parameters == result.adapter.num_parameters
    assert result.rank == result.adapter.rank
    assert result.form == result.adapter.form == form


def test_distances_from_the_inputs_of_the_target():
    source, x = expert(seed=1), normalised(600)
    train, held_out = samples(source, x)
    target, far = expert(seed=3), 5 * normalised(300, seed=9) + 3
    unknown = fit(train, held_out, target, controls=False, solver=QUICK)
    assert all(math.isnan(getattr(unknown, f"{n}_before")) for n in ("kl", "mmd"))
    alike, apart = (
        fit(train, held_out, target, controls=False, solver=QUICK, target_inputs=inputs)
        for inputs in (x[:300], far)
    )
    assert alike.kl_before < 0.5 < apart.kl_before
    assert alike.mmd_before < 0.05 < apart.mmd_before
    same = fit(
        train, held_out, target, form="identity", controls=False, solver=QUICK, target_inputs=far
    )
    assert (same.kl_before, same.mmd_before) == (same.kl_after, same.mmd_after)


def test_nan_and_wrong_shapes_are_refused():
    source = expert(seed=1)
    x = normalised(200)
    broken = x.clone()
    broken[3, 4] = math.nan
    with pytest.raises(AlignmentError, match="outputs hold NaN or infinity.*1 of 3200"):
        Samples(x, broken)
    with pytest.raises(AlignmentError, match="do not fit one another"):
        Samples(x, x[:, :8])
    with pytest.raises(AlignmentError, match="one document per token"):
        Samples(x, x, torch.arange(3))
    good = Samples(x, source(x))
    with pytest.raises(AlignmentError, match="target target: the hidden size"):
        fit(good, good, expert(8))
    infinite = ExpertWeights(source.gate * math.inf, source.up, source.down)
    with pytest.raises(AlignmentError, match="gate of target target"):
        fit(good, good, infinite)


def test_options_that_make_no_sense_are_refused():
    with pytest.raises(OptionError, match="leaves no time"):
        FitOptions(budget_seconds=-1.0)
    with pytest.raises(OptionError, match="at least 1"):
        SolverOptions(steps=0)
    with pytest.raises(OptionError, match="not a share"):
        SolverOptions(inner_share=1.5)


def test_half_precision_and_experts_without_gate():
    source = expert(seed=1).to(dtype=torch.bfloat16)
    x = normalised(400).bfloat16()
    train, held_out = samples(source, x)
    target = ExpertWeights(
        None,
        torch.randn(20, 16) / 4,
        torch.randn(16, 20) / 4,
        "gelu",
        up_bias=torch.randn(20),
        down_bias=torch.randn(16),
    )
    found = fit_pairs(
        train,
        held_out,
        {"plain": target, "gated": expert(seed=3)},
        source=source,
        options=FitOptions(solver=QUICK),
    )
    assert all(math.isfinite(r.score) or r.status == "undefined" for r in found.values())
    assert found["plain"].adapter.weight.dtype == torch.float32
