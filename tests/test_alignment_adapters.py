"""Every form of adapter: what it can express is found, and nothing else is trained."""

from dataclasses import replace

import pytest
import torch

from adapters_zoo import planted, random_adapter
from alignment_zoo import expert, normalised
from moescope.alignment.controls import rotation_for
from moescope.alignment.domains import Domain, coordinates
from moescope.alignment.optimiser import newton_schulz, retract, tangent
from moescope.alignment.options import FitOptions, SolverOptions
from moescope.alignment.randomness import generator
from moescope.alignment.regularisers import divergences
from moescope.alignment.samples import Samples
from moescope.alignment.solver import Task, solve
from moescope.alignment.stack import AdapterStack
from moescope.alignment.warm_starts import resumed
from moescope.errors import OptionError
from moescope.experts.adapter import TENSORS

FORMS = list(TENSORS)
QUICK = SolverOptions(steps=120)
TRAINED = [form for form in FORMS if form != "identity"]


def stack_of(adapters):
    parts = [adapter.tensors() for adapter in adapters]
    joined = {name: torch.stack([each[name] for each in parts]) for name in parts[0]}
    return AdapterStack.holding(adapters[0].form, joined)


def task_for(case, **options):
    options = {"solver": QUICK} | options
    train, inner, _ = case.parts()
    return Task.of(train, inner, FitOptions(**options), lambda: generator(0, "order"))


def domain_of(case):
    """Where the target's inputs lie, as far as 400 of them tell."""
    return Domain.of(case.adapter(case.tokens.inputs)[:400], 0.01, generator(0, "domain"))


def fitted(case, **options):
    """The one fit, and its FVU on the held-out tokens."""
    (fit,) = solve(task_for(case, **options), [case.target], [domain_of(case)])
    train, _, held_out = case.parts()
    error = (case.target(fit.adapter(held_out.inputs)) - held_out.outputs).square().sum()
    total = (held_out.outputs - train.outputs.mean(0)).square().sum()
    return fit, float(error / total)


@pytest.mark.parametrize("form", FORMS)
def test_a_planted_adapter_of_each_form_is_found(form):
    case = planted(form, seed=1)
    fit, fvu = fitted(case, form=form, rank=2, solver=SolverOptions(steps=200))
    assert fvu < 0.02
    assert (fit.adapter.form, fit.adapter.rank) == (form, case.adapter.rank)
    assert fit.adapter.num_parameters == case.adapter.num_parameters
    assert not fit.constant_kept
    if form == "orthogonal":
        weight = fit.adapter.weight
        torch.testing.assert_close(weight @ weight.T, torch.eye(16), atol=1e-5, rtol=0)


def test_a_form_does_no_more_than_it_may():
    """Behind a full matrix, the elementwise forms and the identity are no way through."""
    case = planted("linear", seed=1)
    fvu = {form: fitted(case, form=form)[1] for form in ("linear", "scale", "identity")}
    assert fvu["linear"] < 0.02
    assert min(fvu["scale"], fvu["identity"]) > 10 * fvu["linear"]


def test_the_linear_form_keeps_the_length_that_layer_norm_takes_away():
    """Inputs that differ in length alone are one input to a LayerNorm."""
    case = planted("linear", seed=1)
    length = 2 * torch.rand(2_000, 1, generator=torch.Generator().manual_seed(0))
    x = normalised(2_000) * length
    lengths = replace(case, tokens=Samples(x, case.source(x), case.tokens.documents))
    options = {"solver": SolverOptions(steps=250)}
    fvu = {form: fitted(lengths, form=form, **options)[1] for form in ("linear", "layer_norm")}
    assert fvu["linear"] < 0.01
    assert fvu["layer_norm"] > 10 * fvu["linear"]


def test_the_identity_trains_nothing():
    fit, fvu = fitted(planted("identity"), form="identity")
    assert (fit.steps, fit.curve, fit.adapter.num_parameters) == (0, (), 0)
    assert fvu < 1e-6
    assert fit.converged
    assert len(fit.constant) == 16


@pytest.mark.parametrize("form", TRAINED)
def test_a_stack_equals_its_adapters(form):
    adapters, x = [random_adapter(form, seed=seed) for seed in (0, 1, 2)], normalised(20)
    stack = stack_of(adapters)
    expected = torch.stack([adapter(x) for adapter in adapters])
    torch.testing.assert_close(stack(x), expected, atol=1e-5, rtol=1e-4)
    kept = stack.keep(torch.tensor([False, True, True]))
    torch.testing.assert_close(kept.adapter(1)(x), expected[2])
    constant = torch.randn(3, 16)
    silent = stack.silenced(constant)
    torch.testing.assert_close(silent(x), constant[:, None].expand(-1, 20, -1))


@pytest.mark.parametrize("form", TRAINED)
def test_coordinates_fold_into_every_form(form):
    """Dimensions of very different sizes with an offset: white in training, plain afterwards."""
    x = torch.randn(500, 16, generator=torch.Generator().manual_seed(0))
    x = x * torch.logspace(-1, 1, 16) + torch.linspace(-3, 3, 16)
    stack = stack_of([random_adapter(form, seed=seed) for seed in (0, 1)])
    whitening = coordinates(form, x, 0.01)
    white = whitening(x)
    torch.testing.assert_close(white.mean(0), torch.zeros(16), atol=1e-3, rtol=0)
    assert float(white.square().mean()) == pytest.approx(1, abs=0.02)
    torch.testing.assert_close(stack.folded(whitening)(x), stack(white), atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("form", TRAINED)
def test_warm_starts_are_the_adapters_they_start_from(form):
    case = planted(form)
    task = task_for(case, form=form, rank=2)
    other = random_adapter(form, seed=5)
    begun, units = resumed(form, 2, [case.adapter, other], task.whitening, [domain_of(case)] * 2)
    plain = case.parts()[0].inputs
    expected = torch.stack([case.adapter(plain), other(plain)])
    torch.testing.assert_close(begun(task.train.inputs), expected, atol=5e-3, rtol=1e-3)
    assert units.keys() == begun.tensors().keys()


@pytest.mark.parametrize(("form", "rank"), [("low_rank", 5), ("layer_norm", 16)])
def test_warm_starts_make_room(form, rank):
    """Adapters of ranks 1 and 2 as ones of rank 5, or with a full matrix: the same function."""
    case = planted("low_rank")
    task = task_for(case, form=form, rank=rank)
    adapters = [case.adapter, random_adapter("low_rank", rank=1, seed=5)]
    begun, _ = resumed(form, rank, adapters, task.whitening, [domain_of(case)] * 2)
    assert (begun.adapter(0).form, begun.adapter(1).rank) == (form, rank)
    plain = case.parts()[0].inputs
    expected = torch.stack([adapter(plain) for adapter in adapters])
    torch.testing.assert_close(begun(task.train.inputs), expected, atol=5e-3, rtol=1e-3)


def test_a_warm_start_is_never_left_for_worse():
    case = planted("low_rank")
    options = SolverOptions(steps=20)
    task = task_for(case, form="low_rank", rank=2, solver=options)
    (fit,) = solve(task, [case.target], [domain_of(case)], warm=[case.adapter])
    assert fit.curve[0].fvu < 1e-4
    assert min(point.fvu for point in fit.curve) == fit.curve[0].fvu
    x = case.parts()[2].inputs
    torch.testing.assert_close(fit.adapter(x), case.adapter(x), atol=5e-3, rtol=1e-3)


@pytest.mark.parametrize("name", ["gaussian_kl", "mmd"])
def test_the_regulariser_keeps_adapted_inputs_near_those_of_the_target(name):
    case = planted("layer_norm")
    known, x = case.adapter(case.tokens.inputs), case.parts()[2].inputs
    distances = []
    for chosen in ("none", name):
        task = task_for(case, regulariser=chosen, regulariser_weight=0.1)
        (fit,) = solve(task, [expert(seed=9)], [domain_of(case)])  # a stranger
        assert not fit.constant_kept
        kl, mmd = divergences(fit.adapter(x), known)
        distances.append({"gaussian_kl": float(kl), "mmd": float(mmd)})
    before, after = distances
    assert after[name] < 0.8 * before[name]


def test_a_tangent_step_stays_orthogonal_to_first_order_and_a_retraction_to_the_last():
    g = torch.Generator().manual_seed(0)
    weight = torch.stack([rotation_for(16, seed, "w") for seed in (0, 1)])
    step = tangent(torch.randn(2, 16, 16, generator=g), weight)
    turned = weight.mT @ step
    torch.testing.assert_close(turned, -turned.mT, atol=1e-5, rtol=0)
    moved = weight - 0.2 * newton_schulz(step)
    exact = torch.linalg.svd(moved)
    torch.testing.assert_close(retract(moved), exact.U @ exact.Vh, atol=1e-5, rtol=0)


def test_newton_schulz_of_tall_wide_and_empty_matrices():
    g = torch.Generator().manual_seed(0)
    tall = torch.randn(2, 16, 3, generator=g)
    torch.testing.assert_close(newton_schulz(tall), newton_schulz(tall.mT).mT)
    values = torch.linalg.svdvals(newton_schulz(tall))
    assert 0.6 < values.min() < values.max() < 1.3
    assert newton_schulz(tall[:, :, :0]).shape == (2, 16, 0)


@pytest.mark.parametrize("rank", [0, 1, 2, 3, 8, 16])
def test_hidden_rotations_of_low_rank(rank):
    rotation = rotation_for(16, 0, "source", rank).double()
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(16).double(), atol=1e-6, rtol=0)
    values = torch.linalg.svdvals(rotation - torch.eye(16))
    assert int((values > 1e-2).sum()) == rank
    assert float(values[rank:].sum()) < 1e-5
    assert not torch.equal(rotation, rotation_for(16, 0, "other", rank)) or rank == 0


@pytest.mark.parametrize(("form", "rank"), [("scale", 0), ("low_rank", 2), ("orthogonal", None)])
def test_the_hidden_rotation_of_a_form_is_within_its_reach(form, rank):
    """R x itself is what the adapter has to give."""
    rotation, x = rotation_for(16, 0, "source", rank), normalised(400)
    target = expert(seed=1)
    source = replace(target, gate=target.gate @ rotation, up=target.up @ rotation)
    train, inner = Samples(x[:300], source(x[:300])), Samples(x[300:], source(x[300:]))
    options = FitOptions(form=form, rank=2, solver=QUICK)
    task = Task.of(train, inner, options, lambda: generator(0, "order"))
    domain = Domain.of(x @ rotation.T, 0.01, generator(0, "domain"))
    (fit,) = solve(task, [target], [domain])
    assert min(point.fvu for point in fit.curve) < 0.05


def test_negative_ranks_are_refused():
    with pytest.raises(OptionError, match="`rank` is negative"):
        FitOptions(rank=-1)
