"""The start of a fit: mean Jacobians, the turn that lines them up, coordinates."""

import math

import pytest
import torch
from torch.func import jacrev, vmap

from alignment_zoo import documents, expert, normalised, reparametrised, samples
from moescope.alignment.controls import rotation_for
from moescope.alignment.domains import Domain, coordinates
from moescope.alignment.fit import fit
from moescope.alignment.linear_parts import SourceLinear, mean_jacobians, regressed
from moescope.alignment.options import SolverOptions
from moescope.alignment.randomness import generator
from moescope.alignment.samples import Samples
from moescope.alignment.stack import ExpertStack
from moescope.alignment.transport import aligned, least_read, transported_start
from moescope.alignment.whitening import Whitening
from moescope.errors import AlignmentError
from moescope.experts.weights import ExpertWeights

CPU = torch.device("cpu")


def with_biases():
    source = expert(hidden=8, wide=12, seed=2)
    g = torch.Generator().manual_seed(3)
    biases = [torch.randn(size, generator=g) for size in (12, 12, 8)]
    return ExpertWeights(source.gate, source.up, source.down, "silu", *biases)


def without_gate():
    return ExpertWeights(None, expert(hidden=8, wide=12, seed=2).up, torch.ones(8, 12), "gelu")


@pytest.mark.parametrize("source", [with_biases(), without_gate()])
def test_mean_jacobians_are_the_mean_of_the_jacobians(source):
    x = normalised(40, hidden=8)
    single = vmap(jacrev(lambda row: source(row[None])[0]))(x)  # [tokens, out, in]
    found = mean_jacobians(ExpertStack.of([source], CPU), x[None])[0]
    torch.testing.assert_close(found, single.mean(0).T, rtol=1e-4, atol=1e-5)


def test_regression_finds_a_linear_map():
    g = torch.Generator().manual_seed(0)
    white, matrix = torch.randn(4_000, 6, generator=g), torch.randn(6, 6, generator=g)
    # The ridge shrinks by 1 / 1.1 where the inputs are white.
    torch.testing.assert_close(1.1 * regressed(white, white @ matrix), matrix, rtol=0.1, atol=0.1)


def test_a_hidden_rotation_is_found_without_a_step():
    source, x = expert(), normalised()
    train, _ = samples(source, x)
    rotation = rotation_for(16, 0, "test")
    target = ExpertStack.of([reparametrised(source, rotation)], CPU)
    domain = Domain.of(train.inputs @ rotation.T, 0.01, generator(0, "domain"))
    white = coordinates("linear", train.inputs, 0.01)
    linear = SourceLinear.of(train, white, source, 0.01)
    jacobians = mean_jacobians(target, domain.inputs[None])
    found = aligned(linear, torch.eye(16), jacobians, torch.eye(16)[None])[0]
    torch.testing.assert_close(found, rotation, rtol=0.05, atol=0.05)


def test_the_start_of_a_hidden_rotation_uses_the_whole_spread():
    """Beside it, a stranger: its inputs are moved less, and the steps are larger."""
    source, x = expert(), normalised()
    train, _ = samples(source, x)
    rotation = rotation_for(16, 0, "test")
    targets = ExpertStack.of([reparametrised(source, rotation), expert(seed=5)], CPU)
    domains = [
        Domain.of(inputs, 0.01, generator(0, "domain"))
        for inputs in (train.inputs @ rotation.T, normalised(seed=5))
    ]
    white = coordinates("linear", train.inputs, 0.01)
    linear = SourceLinear.of(train, white, source, 0.01)
    white_train = type(train)(white(train.inputs), train.outputs)
    tensors, units = transported_start("linear", white_train, linear, targets, domains)
    sizes = torch.linalg.matrix_norm(tensors["weight"] @ white.matrix.mT, ord=2)
    assert sizes[0] == pytest.approx(1.0, abs=0.1)
    assert sizes[1] < 0.8 * sizes[0]
    assert (units["weight"][0] < 0.1 * units["weight"][1]).all()


def test_the_offset_is_what_the_target_does_not_read():
    """Neurons that read four dimensions of sixteen: nothing of what they read may be lost."""
    source = expert()
    reads_little = torch.zeros(24, 16)
    reads_little[:, :4] = source.up[:, :4]
    stack = ExpertStack.of([ExpertWeights(reads_little, reads_little, source.down)], CPU)
    direction = least_read(stack, torch.ones(1, 16))[0]
    assert direction.square().mean() == pytest.approx(1.0, abs=1e-5)
    assert direction.mean().abs() < 1e-6
    # What is left in the four is there because the mean was taken away.
    assert direction[:4].square().sum() < 0.25 * direction.square().sum()


def test_half_whitened_coordinates():
    x = normalised() * torch.tensor([100.0] + [1.0] * 15)
    white = Whitening.in_part(x, 0.0)
    found = torch.cov(white(x).T, correction=0)
    values = torch.linalg.eigvalsh(torch.corrcoef(x.T).double()).clamp_min(0).sqrt()
    expected = (values / values.mean()).float()
    torch.testing.assert_close(torch.linalg.eigvalsh(found), expected, rtol=0.02, atol=0.02)
    torch.testing.assert_close(white(x) @ white.inverse + white.mean, x, rtol=1e-2, atol=1e-2)


def test_a_map_that_is_no_rotation_is_found():
    """Of full moments: the linear map has a condition number of about a hundred."""
    source, x = expert(), normalised() + 0.1 * normalised(seed=3)
    train, held_out = samples(source, x)
    turn, again = rotation_for(16, 0, "left"), rotation_for(16, 0, "right")
    matrix = turn * torch.logspace(-1, 1, 16) @ again
    back = torch.linalg.inv(matrix)
    target = ExpertWeights(source.gate @ back, source.up @ back, source.down)
    found = fit(
        train,
        held_out,
        target,
        source=source,
        target_inputs=x[:600] @ matrix.T,
        form="linear",
        controls=False,
    )
    assert found.fvu < 0.02


def test_a_regulariser_needs_to_know_the_inputs():
    train, held_out = samples(expert(), normalised())
    for known in (None, normalised(63)):
        with pytest.raises(AlignmentError, match="inputs of the target"):
            fit(train, held_out, expert(seed=1), target_inputs=known, regulariser="mmd")


def test_inputs_that_never_move_give_a_constant():
    """Nothing can be learned: the constant adapter, and no NaN on tokens that do move."""
    source, x = expert(), normalised(400)
    still = Samples(torch.ones(400, 16), source(x), documents(400, 40))
    moving = Samples(x, source(x), documents(400, 40))
    found = fit(still, moving, expert(seed=1), controls=False)
    assert math.isfinite(found.fvu)
    assert found.constant_kept


def test_bfloat16_products_end_as_near():
    source, x = expert(), normalised()
    train, held_out = samples(source, x)
    rotation = rotation_for(16, 0, "test")
    target = reparametrised(source, rotation)
    found = [
        fit(
            train,
            held_out,
            target,
            source=source,
            target_inputs=x[:500] @ rotation.T,
            controls=False,
            solver=SolverOptions(precision=precision),
        )
        for precision in ("float32", "bfloat16")
    ]
    assert found[0].fvu != found[1].fvu
    assert found[1].fvu < max(2 * found[0].fvu, 0.05)
    assert found[1].adapter.weight.dtype == torch.float32
