"""Everything on the device of the tokens, whatever the dtype of tokens and experts.

On the device `meta` tensors have shapes and no values: what runs there makes no tensor on another
device and reads no value back, which on a GPU would stop the stream.
"""

import math

import pytest
import torch

from alignment_zoo import expert, normalised, samples
from moescope.alignment.controls import project_on_outputs
from moescope.alignment.optimiser import Optimiser
from moescope.alignment.options import FitOptions, SolverOptions
from moescope.alignment.pairs import fit_pairs
from moescope.alignment.samples import Samples
from moescope.alignment.stack import AdapterStack, ExpertStack
from moescope.experts.adapter import TENSORS, Adapter
from moescope.experts.weights import ExpertWeights
from moescope.measures.divergence import gaussian_kl, median_bandwidth, mmd

META = torch.device("meta")
FITS, TOKENS, HIDDEN, WIDE, RANK = 3, 7, 16, 24, 2
OPTIONS = FitOptions(solver=SolverOptions(steps=10))
FORMS = [form for form in TENSORS if form != "identity"]


def adapters(form):
    sizes = {
        "weight": (HIDDEN, HIDDEN),
        "left": (HIDDEN, RANK),
        "right": (RANK, HIDDEN),
        "gain": (1,) if form == "orthogonal" else (HIDDEN,),
    }
    return AdapterStack.holding(
        form,
        {
            name: torch.empty(FITS, *sizes.get(name, (HIDDEN,)), device=META)
            for name in TENSORS[form]
        },
    )


def experts(bias):
    vector = torch.empty(WIDE) if bias else None
    one = expert(HIDDEN, WIDE)
    one = ExpertWeights(one.gate, one.up, one.down, gate_bias=vector, up_bias=vector)
    return ExpertStack.of([one.to(device=META)] * FITS, META)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_a_training_step_reads_no_value_back(form, bias):
    stack, targets = adapters(form), experts(bias)
    units = {name: tensor[..., :1] for name, tensor in stack.tensors().items()}
    optimiser = Optimiser(stack, units, SolverOptions())
    parameters = [p.requires_grad_() for p in stack.parameters()]
    x = torch.empty(TOKENS, HIDDEN, device=META)
    given = targets(stack(x))
    assert given.shape == (FITS, TOKENS, HIDDEN)
    assert given.device == META
    gradients = torch.autograd.grad((given - x).square().sum(), parameters)
    assert [g.shape for g in gradients] == [p.shape for p in parameters]
    with torch.no_grad():
        for p in parameters:
            p.requires_grad_(False)
        optimiser.step(gradients, 1.0)
    assert {t.device for t in stack.parameters()} == {META}
    assert {t.dtype for t in stack.parameters()} == {torch.float32}


def test_experts_are_stacked_on_the_device_they_are_wanted_on():
    half = expert(HIDDEN, WIDE).to(dtype=torch.bfloat16)
    stack = ExpertStack.of([half, half], META)
    for part in (stack.gate, stack.up, stack.down):
        assert part.device == META
        assert part.dtype == torch.float32
    assert stack.up.shape == (2, HIDDEN, WIDE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_and_adapters_keep_device_and_dtype(dtype):
    x = torch.empty(TOKENS, HIDDEN, device=META, dtype=dtype)
    y = expert(HIDDEN, WIDE).to(device=META, dtype=dtype)(x)
    assert (y.device, y.dtype, y.shape) == (META, dtype, x.shape)
    for form in FORMS:
        adapter = adapters(form).adapter(0).to(dtype=dtype)
        assert isinstance(adapter, Adapter)
        z = adapter(x)
        assert (z.device, z.dtype, z.shape) == (META, dtype, x.shape)


def test_measures_stay_on_the_device():
    x = torch.empty(FITS, TOKENS, HIDDEN, device=META)
    mean, covariance = x[:, 0], torch.empty(FITS, HIDDEN, HIDDEN, device=META)
    for found in (gaussian_kl(mean, covariance, mean, covariance), mmd(x, x, x[:, 0, 0])):
        assert (found.device, found.shape) == (META, (FITS,))
    assert median_bandwidth(x).device == META


def problem(dtype, device="cpu"):
    source, targets = expert(seed=1), {"other": expert(seed=3), "same": expert(seed=1)}
    train, held_out = (
        Samples(part.inputs.to(device, dtype), part.outputs.to(device, dtype), part.documents)
        for part in samples(source, normalised(600))
    )
    return (
        train,
        held_out,
        {
            "targets": {name: e.to(dtype=dtype, device=device) for name, e in targets.items()},
            "source": source.to(dtype=dtype, device=device),
            "target_inputs": dict.fromkeys(targets, normalised(200, seed=9).to(device, dtype)),
        },
    )


@pytest.fixture(scope="module")
def single():
    train, held_out, arguments = problem(torch.float32)
    return fit_pairs(train, held_out, **arguments, options=OPTIONS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_single(dtype, single):
    train, held_out, arguments = problem(dtype)
    found = fit_pairs(train, held_out, **arguments, options=OPTIONS)
    for name, result in found.items():
        assert result.adapter.weight.dtype == torch.float32
        for column in ("fvu", "fvu_linear", "fvu_random", "fvu_self", "fvu_constant"):
            value = getattr(result, column)
            assert math.isfinite(value)
            assert value == pytest.approx(getattr(single[name], column), abs=0.06, rel=0.2)


def test_the_floor_is_that_of_the_device_and_dtype():
    target = expert(HIDDEN, 8).to(dtype=torch.bfloat16)
    y = normalised(20)
    near = project_on_outputs(y, target)
    assert near.dtype == torch.float32
    torch.testing.assert_close(project_on_outputs(near, target), near, atol=1e-4, rtol=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_finds_what_a_cpu_finds(dtype):
    train, held_out, arguments = problem(dtype)
    expected = fit_pairs(train, held_out, **arguments, options=OPTIONS)
    train, held_out, arguments = problem(dtype, "cuda")
    found = fit_pairs(train, held_out, **arguments, options=OPTIONS)
    for name, result in found.items():
        assert result.adapter.weight.device.type == "cuda"
        assert result.fvu == pytest.approx(expected[name].fvu, abs=0.02)
        assert result.fvu_random == pytest.approx(expected[name].fvu_random, abs=0.02)
