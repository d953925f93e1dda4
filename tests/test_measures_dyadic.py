"""Pairs share experts: tests and intervals that know it."""

import numpy as np
import pytest
from scipy.stats import kstest, pearsonr

from moescope.measures.dyadic import FEWEST_EXPERTS, mantel, pair_mean, permutation_p, within

UPPER = np.triu_indices(8, 1)


def symmetric(random, experts=8):
    values = random.normal(size=(experts, experts))
    return values + values.T


def test_mantel_against_plain_loops():
    random = np.random.default_rng(0)
    one, other = symmetric(random), symmetric(random)
    other += one
    found = mantel(one, other, permutations=4_999, seed=0)
    assert found.r == pytest.approx(pearsonr(one[UPPER], other[UPPER]).statistic)
    orders = [random.permutation(8) for _ in range(2_000)]
    null = [pearsonr(one[UPPER], other[np.ix_(o, o)][UPPER]).statistic for o in orders]
    expected = permutation_p(found.r, np.array(null))
    assert found.p_value == pytest.approx(expected, abs=0.01)
    assert found.n_pairs == 28
    assert len(found.null) == 4_999


def test_mantel_is_calibrated_where_pairs_share_experts():
    """Similarities of unrelated random vectors: pairs are dependent, p is uniform all the same."""
    random = np.random.default_rng(1)
    values = []
    for draw in range(1_000):
        router, neurons = (random.normal(size=(8, 4)) for _ in range(2))
        values.append(
            mantel(np.corrcoef(router), np.corrcoef(neurons), permutations=199, seed=draw).p_value
        )
    # p takes steps of 1/200: spread evenly within a step for the test of a continuous law.
    smooth = np.array(values) - random.uniform(size=len(values)) / 200
    assert kstest(smooth, "uniform").pvalue > 0.01
    assert np.mean(np.array(values) <= 0.05) == pytest.approx(0.05, abs=0.02)


def test_equal_similarities_have_r_one_and_p_at_its_floor():
    one = symmetric(np.random.default_rng(2), experts=12)
    found = mantel(one, one, permutations=999, seed=0)
    assert found.r == pytest.approx(1)
    assert found.p_value == 1 / 1_000


def test_opposite_similarities_are_as_clear():
    one = symmetric(np.random.default_rng(2), experts=12)
    found = mantel(one, -one, permutations=999, seed=0)
    assert found.r == pytest.approx(-1)
    assert found.p_value == 1 / 1_000


@pytest.mark.parametrize("experts", [1, 2, 8])
def test_what_does_not_vary_has_no_correlation(experts):
    found = mantel(np.ones((experts, experts)), np.ones((experts, experts)), permutations=9, seed=0)
    assert np.isnan(found.r)
    assert np.isnan(found.p_value)


def test_a_mean_over_pairs_counts_each_once():
    values = np.arange(36.0).reshape(6, 6)
    found = pair_mean(within(values), same=True)
    assert found.mean == pytest.approx(values[np.triu_indices(6, 1)].mean())
    assert found.n_pairs == 15
    assert found.low < found.mean < found.high


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_the_interval_covers_where_pairs_share_experts(share):
    """Values of pairs are those of both experts, their own, or both; 8 experts, 2,000 draws."""
    random = np.random.default_rng(3)
    covered, naive = [], []
    for _ in range(2_000):
        own = random.normal(size=8)
        noise = symmetric(random)
        values = within(share * (own[:, None] + own) + (1 - share) * noise)
        found = pair_mean(values, same=True)
        covered.append(found.low <= 0 <= found.high)
        present = values[UPPER]
        naive.append(abs(present.mean()) <= 2.05 * present.std(ddof=1) / np.sqrt(28))
    assert np.mean(covered) >= 0.94
    if share == 1:
        assert np.mean(naive) < 0.75  # as if pairs were independent


def test_the_interval_covers_between_two_layers():
    random = np.random.default_rng(4)
    covered = []
    for _ in range(2_000):
        values = random.normal(size=(8, 1)) + random.normal(size=6)
        found = pair_mean(values + random.normal(size=(8, 6)), same=False)
        covered.append(found.low <= 0 <= found.high)
    assert 0.93 <= np.mean(covered) <= 0.995


def test_some_of_the_pairs():
    random = np.random.default_rng(5)
    values = within(symmetric(random, experts=20))
    values[random.uniform(size=values.shape) < 0.6] = np.nan
    found = pair_mean(values, same=True)
    assert found.mean == pytest.approx(np.nanmean(values))
    assert found.n_pairs == np.isfinite(values).sum()
    assert found.low < found.mean < found.high


@pytest.mark.parametrize("experts", [1, 2, FEWEST_EXPERTS - 1])
def test_too_few_experts_have_no_interval(experts):
    found = pair_mean(within(np.ones((experts, experts))), same=True)
    assert np.isnan(found.low)
    assert np.isnan(found.high)
    assert found.n_pairs == experts * (experts - 1) // 2
