"""BCa intervals: against scipy, and how often they cover."""

import math

import numpy as np
import pytest
from scipy import stats

from moescope.measures.bootstrap import bca_interval, leave_one_out_totals, resampled_totals


def ratio(totals):
    return totals[:, 0] / totals[:, 1]


def interval(sums, draws, generator):
    replicates = ratio(resampled_totals(sums, draws, generator))
    estimate = float(ratio(sums.sum(0, keepdims=True))[0])
    return bca_interval(estimate, replicates, ratio(leave_one_out_totals(sums)))


def documents(generator, number):
    """Sizes and errors per document, skewed; the true ratio is 0.5."""
    size = generator.lognormal(4, 0.6, number)
    return np.stack([size * 0.5 * generator.gamma(4, 1 / 4, number), size], axis=1)


def nominal(units):
    """The level that a plain BCa interval must be asked for: Hesterberg's expansion."""
    t = stats.t(units - 1).ppf(0.975) * (units / (units - 1)) ** 0.5
    return 2 * stats.norm.cdf(t) - 1


def test_equals_scipy():
    sums = documents(np.random.default_rng(0), 60)
    low, high = interval(sums, 20_000, np.random.default_rng(1))
    reference = stats.bootstrap(
        (sums[:, 0], sums[:, 1]),
        lambda a, b, axis=-1: a.sum(axis) / b.sum(axis),
        paired=True,
        vectorized=True,
        method="BCa",
        n_resamples=20_000,
        confidence_level=nominal(60),
        rng=np.random.default_rng(2),
    ).confidence_interval
    width = high - low
    assert low == pytest.approx(reference.low, abs=0.03 * width)
    assert high == pytest.approx(reference.high, abs=0.03 * width)


def test_same_replicates_give_scipys_limits():
    """With the very same replicates, only the formula is left to differ."""
    values = np.random.default_rng(0).exponential(size=40)
    result = stats.bootstrap(
        (values,),
        np.mean,
        method="BCa",
        n_resamples=2_000,
        confidence_level=nominal(40),
        rng=np.random.default_rng(1),
    )
    jackknife = (values.sum() - values) / 39
    low, high = bca_interval(float(values.mean()), result.bootstrap_distribution, jackknife)
    assert low == pytest.approx(result.confidence_interval.low, rel=1e-3)
    assert high == pytest.approx(result.confidence_interval.high, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("number", [30, 60])
def test_coverage_in_1000_draws(number):
    generator = np.random.default_rng(number)
    hits = 0
    for _ in range(1_000):
        low, high = interval(documents(generator, number), 1_000, generator)
        hits += low <= 0.5 <= high
    # The binomial standard error at 1,000 draws is 0.7 points.
    print(number, hits / 1_000)
    assert 0.92 <= hits / 1_000 <= 0.97


def test_no_interval_out_of_nothing():
    nan = math.nan
    assert all(map(math.isnan, bca_interval(nan, np.ones(10), np.ones(3))))
    assert all(map(math.isnan, bca_interval(1.0, np.array([nan, nan, 1.0]), np.ones(3))))
    assert bca_interval(1.0, np.ones(100), np.ones(30)) == (1.0, 1.0)
