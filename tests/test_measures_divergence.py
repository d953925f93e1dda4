"""Divergences: against torch.distributions, a double loop, and what must hold for any sample."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import MultivariateNormal, kl_divergence

from moescope.alignment.domains import Domain
from moescope.alignment.options import FitOptions
from moescope.alignment.regularisers import divergences, penalty
from moescope.errors import OptionError
from moescope.measures.divergence import gaussian_kl, median_bandwidth, mmd, shrunken_moments

seeds = st.integers(0, 2**31)


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def gaussian(*shape, seed):
    """Mean and a covariance whose scales differ by a thousand."""
    *batch, hidden = shape
    root = randn(*batch, hidden, hidden, seed=seed) * torch.logspace(-1.5, 1.5, hidden)
    return randn(*shape, seed=seed + 1), root @ root.mT + 0.01 * torch.eye(hidden)


@settings(max_examples=40, deadline=None)
@given(seeds)
def test_gaussian_kl_against_torch(seed):
    p, q = gaussian(3, 4, seed=seed), gaussian(3, 4, seed=seed + 7)
    expected = kl_divergence(MultivariateNormal(*p), MultivariateNormal(*q))
    torch.testing.assert_close(gaussian_kl(*p, *q), expected, rtol=1e-6, atol=1e-6)
    assert (expected > 0).all()
    torch.testing.assert_close(gaussian_kl(*p, *p), torch.zeros(3).double(), rtol=0, atol=1e-8)


@settings(max_examples=40, deadline=None)
@given(seeds)
def test_gaussian_kl_does_not_know_the_coordinates(seed):
    p, q = gaussian(4, seed=seed), gaussian(4, seed=seed + 7)
    matrix, offset = randn(4, 4, seed=seed + 9) + 3 * torch.eye(4), randn(4, seed=seed)
    moved = [(matrix @ mean + offset, matrix @ cov @ matrix.T) for mean, cov in (p, q)]
    torch.testing.assert_close(
        gaussian_kl(*moved[0], *moved[1]), gaussian_kl(*p, *q), rtol=1e-5, atol=1e-7
    )


def test_gaussian_kl_by_hand_and_without_a_volume():
    """Variances 4 and 1 at distance 3: (4 + 9 - 1 - ln 4) / 2."""
    one, zero = torch.ones(1), torch.zeros(1)
    assert gaussian_kl(3 * one, 4 * one[None], zero, one[None]).item() == pytest.approx(
        (4 + 9 - 1 - math.log(4)) / 2
    )
    flat = torch.stack([torch.eye(2), torch.zeros(2, 2)])
    found = gaussian_kl(torch.zeros(2, 2), flat, torch.zeros(2, 2), torch.eye(2).expand(2, 2, 2))
    assert found[0] == 0
    assert found[1].isnan()


@settings(max_examples=40, deadline=None)
@given(seeds, st.floats(0, 1))
def test_shrinking_keeps_variances_and_scales_correlations(seed, share):
    x = randn(2, 5, 9, seed=seed)
    mean, covariance = shrunken_moments(x, share, torch.tensor(0.0))
    torch.testing.assert_close(mean, x.mean(1))
    for own, sample in zip(covariance, x, strict=True):
        expected = sample.T.cov(correction=0)
        keep = torch.where(torch.eye(9) == 1, 1, 1 - share)
        torch.testing.assert_close(own, expected * keep)


@settings(max_examples=40, deadline=None)
@given(seeds)
def test_mmd_against_a_double_loop(seed):
    x, y = randn(6, 3, seed=seed), 0.5 + randn(8, 3, seed=seed + 1)
    bandwidth = median_bandwidth(y)
    distances = sorted(float((a - b).norm()) for i, a in enumerate(y) for b in y[:i])
    assert float(bandwidth) == pytest.approx(distances[(len(distances) - 1) // 2], rel=1e-6)

    def kernel(a, b):
        return math.exp(-float((a - b).square().sum()) / (2 * float(bandwidth) ** 2))

    own = [
        sum(kernel(a, b) for i, a in enumerate(s) for j, b in enumerate(s) if i != j)
        / (len(s) * (len(s) - 1))
        for s in (x, y)
    ]
    across = sum(kernel(a, b) for a in x for b in y) / (len(x) * len(y))
    expected = sum(own) - 2 * across
    assert float(mmd(x, y, bandwidth)) == pytest.approx(expected, abs=1e-9)
    assert float(mmd(y, x, bandwidth)) == pytest.approx(expected, abs=1e-9)
    batched = mmd(torch.stack([x, x + 1]), torch.stack([y, y + 1]), bandwidth.expand(2))
    assert batched.tolist() == pytest.approx([expected] * 2, abs=1e-9)


def test_mmd_is_unbiased_and_sees_a_shift():
    """The biased form would be about (1 - mean kernel) * 2 / n = 0.04 above zero."""
    values = [
        float(mmd(randn(20, 3, seed=s), randn(20, 3, seed=10_000 + s), torch.tensor(1.5).double()))
        for s in range(500)
    ]
    error = torch.tensor(values).std().item() / 500**0.5
    assert abs(sum(values) / 500) < 4 * error < 0.01
    shifted = mmd(randn(200, 3), 1 + randn(200, 3, seed=1), torch.tensor(1.5).double())
    # Exact for Gaussians: with variance 1, bandwidth b: 2 (b^2 / (b^2 + 2))^(3/2) (1 - e^(-...)).
    b = 1.5**2
    expected = 2 * (b / (b + 2)) ** 1.5 * (1 - math.exp(-3 / (2 * (b + 2))))
    assert float(shifted) == pytest.approx(expected, rel=0.15)


def test_too_few_or_equal_tokens_have_no_surprise():
    assert median_bandwidth(randn(1, 3)).isnan()
    assert mmd(randn(1, 3), randn(5, 3), torch.tensor(1.0).double()).isnan()
    same = torch.ones(4, 3)
    assert mmd(same, same, median_bandwidth(same)) == 0
    assert mmd(same + 1, same, median_bandwidth(same)) == 2


def inputs(number, *, seed, hidden=32):
    """Correlated, off the origin, with a dimension a hundred times the others."""
    mixing = torch.linalg.qr(randn(hidden, hidden, seed=99))[0]
    x = randn(number, hidden, seed=seed) * torch.logspace(0, -1, hidden) @ mixing.double()
    x[:, 3] = 100 * x[:, 3] + 5
    return x.float()


def domain(number=400):
    return Domain.of(inputs(number, seed=0), 0.01, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ["gaussian_kl", "mmd"])
@pytest.mark.parametrize("tokens", [20, 200])
def test_the_target_s_own_inputs_are_nearest(name, tokens):
    own = inputs(tokens, seed=1)
    mean = inputs(5_000, seed=2).mean(0)
    others = [own, mean + 0.3 * (own - mean), mean + 3 * (own - mean), own + 2 * own.std(0)]
    found = penalty(name, torch.stack(others), [domain()] * 4)
    assert found.argmin() == 0
    assert found[0] < 0.5 * found[1:].min()


@pytest.mark.parametrize("name", ["gaussian_kl", "mmd"])
def test_descent_brings_inputs_to_the_target(name):
    """Every batch of 20 tokens in 32 dimensions; judged by the other divergence as well."""
    known, x = domain(), randn(600, 32, seed=3).float()
    scale, shift = torch.ones(32, requires_grad=True), torch.zeros(32, requires_grad=True)
    x = x * known.scale
    before = divergences(x, known.inputs)
    optimiser = torch.optim.Adam([scale, shift], lr=0.1)
    for step in range(300):
        batch = x[20 * (step % 30) :][:20]
        optimiser.zero_grad()
        penalty(name, (batch * scale + shift)[None], [known]).sum().backward()
        optimiser.step()
    after = divergences((x * scale + shift).detach(), known.inputs)
    assert after[0] < 0.5 * before[0]
    assert after[1] < 0.5 * before[1]


def test_penalties_of_a_batch_are_those_of_each_fit():
    z = torch.stack([inputs(50, seed=1), 2 * inputs(50, seed=4)])
    domains = [domain(), domain(90)]
    for name in ("gaussian_kl", "mmd", "none"):
        alone = [
            penalty(name, own[None], [known])[0] for own, known in zip(z, domains, strict=True)
        ]
        torch.testing.assert_close(penalty(name, z, domains), torch.stack(alone))
    assert penalty("none", z, domains).tolist() == [0, 0]


def test_divergences_before_and_after_at_once():
    x, own, known = randn(300, 32).float(), inputs(300, seed=1), inputs(2_000, seed=5)
    kl, distance = divergences(torch.stack([x, own, torch.ones_like(x)]), known)
    assert kl[1] < 0.05 * kl[0]
    assert distance[1].abs() < 0.05 * distance[0]
    assert torch.isfinite(kl).all()  # constant inputs too
    torch.testing.assert_close(divergences(own, known)[0], kl[1])


def test_options_of_the_regulariser():
    assert FitOptions(regulariser="mmd", regulariser_weight=0.5).regulariser == "mmd"
    for wrong in (
        {"regulariser_weight": -1.0},
        {"regulariser_weight": math.nan},
        {"regulariser": "mmd", "protocol": "published"},
    ):
        with pytest.raises(OptionError):
            FitOptions(**wrong)
