"""Intervals over documents: against a direct loop, and how often they hold the truth."""

import math

import numpy as np
import pytest
from scipy import stats

from moescope.alignment import score
from moescope.alignment.score import Errors, fvu_interval, score_of
from moescope.measures.bootstrap import expanded_level, ratio_interval, resampled_counts


def by_token(number, seed):
    """Documents of uneven length; squared errors of tokens with heavy tails. The true FVU is 0.3.

    Sums per document of error and of variance.
    """
    g = np.random.default_rng(seed)
    length = np.maximum(5, g.lognormal(4, 0.8, number).astype(int))
    of = np.repeat(np.arange(number), length)
    variance = g.gamma(2, 1 / 2, len(of))
    difficulty = g.lognormal(-(0.3**2) / 2, 0.3, number)[of]
    error = 0.3 * difficulty * 1.5 * g.pareto(2.5, len(of))  # this Pareto has mean 1 / 1.5
    return np.bincount(of, error, number), np.bincount(of, variance, number)


def test_against_a_direct_loop():
    error, total = by_token(40, 0)

    def log_ratio(a, b):
        """With its standard error by the delta method."""
        ratio = a.sum() / b.sum()
        return math.log(ratio), math.sqrt(((a - ratio * b) ** 2).sum()) / (ratio * b.sum())

    estimate, spread = log_ratio(error, total)
    distances = []
    for count in resampled_counts(40, 500, np.random.default_rng(3)):
        drawn = np.repeat(np.arange(40), count.astype(int))
        moved, own = log_ratio(error[drawn], total[drawn])
        distances.append(abs(moved - estimate) / own)
    reach = np.quantile(distances, 0.95) * spread
    low, high = ratio_interval(np.stack([error, 2 * error], axis=1), total, resamples=500, seed=3)
    expected = np.exp([estimate - reach, estimate + reach])
    np.testing.assert_allclose([low[0], high[0]], expected)
    np.testing.assert_allclose([low[1], high[1]], 2 * expected)


def test_of_many_even_documents_is_the_normal_interval():
    g = np.random.default_rng(0)
    total = np.ones(3_000)
    error = 0.5 + 0.1 * g.standard_normal(3_000)
    low, high = fvu_interval(error, total, 0)
    half = stats.norm.ppf(0.975) * 0.1 / math.sqrt(3_000)
    assert low == pytest.approx(error.mean() - half, abs=0.1 * half)
    assert high == pytest.approx(error.mean() + half, abs=0.1 * half)


@pytest.mark.slow
@pytest.mark.parametrize("number", [30, 60, 120])
def test_coverage_of_the_fvu_in_1000_draws(number):
    """The binomial standard error at 1,000 draws is 0.7 points."""
    limits = np.array(
        [ratio_interval_of(by_token(number, 1_000 * number + i), i) for i in range(1_000)]
    )
    low, high = (limits[:, 0] > 0.3).mean(), (limits[:, 1] < 0.3).mean()
    print(number, "covered", 1 - low - high, "above", low, "below", high)
    assert 0.925 <= 1 - low - high <= 0.975


def ratio_interval_of(sums, seed):
    error, total = sums
    low, high = ratio_interval(error[:, None], total, resamples=400, seed=seed)
    return low[0], high[0]


def test_limits_out_of_little():
    total = np.arange(1.0, 31)
    same, none, one = 0.4 * total, 0 * total, np.eye(30)[0]
    low, high = ratio_interval(np.stack([same, none, one], axis=1), total, resamples=500, seed=0)
    np.testing.assert_allclose([low[0], high[0]], 0.4)
    assert (low[1], high[1]) == (0, 0)
    assert 0 < low[2] < 1 / total.sum() < high[2] < 10 / total.sum()
    few = ratio_interval(same[:29, None], total[:29], resamples=500, seed=0)
    assert np.isnan(few).all()


def test_expanded_level():
    """At 30 units, t of 29 degrees of freedom times sqrt(30 / 29): 2.045 * 1.017 = 2.080."""
    assert expanded_level(30) == pytest.approx(1 - 2 * stats.norm.sf(2.0802), abs=1e-4)
    assert expanded_level(10_000) == pytest.approx(0.95, abs=1e-4)


def exchangeable(seed, *, second_kind=0.0, better=0.0, linear=2.0, spread=0.03):
    """A pair that is one more random target of the first kind, but for being `better`.

    Documents of uneven length and difficulty; errors of each with skewed noise.
    """
    g = np.random.default_rng(seed)
    length, difficulty = g.lognormal(0, 0.8, 60), g.lognormal(0, 0.5, 60)

    def errors_at(level):
        return length * difficulty * level * g.gamma(10, 1 / 10, 60)

    levels = 0.7 + spread * g.standard_normal((2, 5)) + [[0.0], [second_kind]]
    return Errors(
        total=length * g.lognormal(0.5**2 / 2 - 0.4**2 / 2, 0.4, 60),
        pair=errors_at(0.7 + spread * g.standard_normal() - better),
        linear=errors_at(linear),
        ceiling=errors_at(0.2),
        random=np.array([[errors_at(level) for level in kind] for kind in levels]),
    )


def share_found(monkeypatch, number, **settings):
    """Share of simulated data sets with a score above zero beyond doubt."""
    monkeypatch.setattr(score, "_DRAWS", 400)
    found = [score_of(exchangeable(seed, **settings), seed).low > 0 for seed in range(number)]
    print(settings, np.mean(found))
    return np.mean(found)


@pytest.mark.slow
@pytest.mark.parametrize("spread", [0.005, 0.1])  # less and more than the chance of documents
@pytest.mark.parametrize(
    "settings",
    [{}, {"second_kind": 0.1}, {"linear": 0.7}],
    ids=["kinds alike", "one kind stronger", "linear map as good as they"],
)
def test_a_random_expert_in_the_place_of_the_pair_is_rarely_found(monkeypatch, settings, spread):
    assert share_found(monkeypatch, 1_000, spread=spread, **settings) <= 0.03


@pytest.mark.slow
@pytest.mark.parametrize("second_kind", [0.0, 0.1])
def test_a_better_pair_is_found(monkeypatch, second_kind):
    """By eight standard deviations of the random targets: five seeds a kind find no less."""
    assert share_found(monkeypatch, 1_000, better=0.25, second_kind=second_kind) > 0.8
