import numpy as np
import pytest
from scipy.stats import t

from moescope.measures.coactivation import count_pairs, independent, quasi_independent, ratio
from moescope.measures.components import principal_components, variance_between
from moescope.measures.jackknife import GROUPS, limits, log_limits, whole_and_left_out


def test_pairs_by_hand():
    experts = np.array([[0, 1], [1, 2], [0, -1]])
    counts = np.zeros((2, 3, 3), dtype=np.int64)
    count_pairs(counts, np.array([0, 0, 1]), experts, experts)
    np.testing.assert_array_equal(counts[0], [[1, 1, 0], [1, 2, 1], [0, 1, 1]])
    np.testing.assert_array_equal(counts[1], [[1, 0, 0], [0, 0, 0], [0, 0, 0]])
    onward = np.zeros((2, 3, 2), dtype=np.int64)
    count_pairs(onward, np.array([0, 0, 1]), experts, np.array([[1], [0], [1]]))
    np.testing.assert_array_equal(onward.sum(0), [[0, 2], [1, 1], [1, 0]])


def test_quasi_independence_recovers_its_own_model():
    a = np.array([3.0, 1.0, 7.0, 2.0, 0.0])
    model = np.outer(a, a) * (1 - np.eye(5))
    counts = np.round(model * 1_000).astype(np.int64)
    expected = quasi_independent(counts + np.diag([9, 9, 9, 9, 9]))
    np.testing.assert_allclose(expected, counts, rtol=1e-6, atol=1e-6)


def test_quasi_independence_keeps_the_sums_and_ignores_nobody():
    random = np.random.default_rng(0)
    half = random.integers(0, 50, size=(3, 6, 6))
    counts = half + half.transpose(0, 2, 1)
    expected = quasi_independent(counts)
    off = ~np.eye(6, dtype=bool)
    np.testing.assert_allclose(expected.sum(-1), (counts * off).sum(-1), rtol=1e-5)
    np.testing.assert_allclose(expected, expected.transpose(0, 2, 1))
    assert (quasi_independent(np.zeros((4, 4), dtype=np.int64)) == 0).all()


def test_independence_of_two_layers_by_hand():
    expected = independent(np.array([[6, 4]]), np.array([[5, 0, 5]]), np.array([10]))
    np.testing.assert_array_equal(expected[0], [[3, 0, 3], [2, 0, 2]])
    lift = ratio(np.array([[6, 0, 0], [2, 0, 2]]), expected[0])
    np.testing.assert_array_equal(lift, [[2, np.nan, 0], [1, np.nan, 1]])


def test_limits_of_a_mean_are_those_of_students_t():
    """For a mean of equal groups, the jackknife is the textbook interval."""
    x = np.random.default_rng(1).normal(size=GROUPS)
    means = np.concatenate([[x.mean()], (x.sum() - x) / (GROUPS - 1)])
    low, high = limits(means)
    expected = t.interval(0.95, GROUPS - 1, loc=x.mean(), scale=x.std(ddof=1) / GROUPS**0.5)
    assert (float(low), float(high)) == pytest.approx(expected)


def test_no_limits_of_few_groups():
    counts = np.zeros((GROUPS, 2), dtype=np.int64)
    counts[:29] = 5
    estimates = whole_and_left_out(counts)
    assert len(estimates) == 30
    assert np.isnan(limits(estimates.astype(float))).all()


def test_limits_of_a_lift_cover_as_often_as_they_say():
    """1,000 sets of 64 documents, two independent layers whose use differs by document."""
    random = np.random.default_rng(2)
    covered = 0
    for _ in range(1_000):
        # Two experts in each layer; both uses vary by document, independently of each other.
        here, there = random.beta(4, 4, size=(2, 64))
        tokens = random.integers(20, 80, size=64)
        cells = np.stack(
            [here * there, here * (1 - there), (1 - here) * there, (1 - here) * (1 - there)], 1
        )
        counts = random.multinomial(tokens, cells).reshape(GROUPS, 2, 2, 2).sum(1)
        together = whole_and_left_out(counts)
        expected = independent(together.sum(2), together.sum(1), together.sum((1, 2)))
        low, high = log_limits(ratio(together, expected))
        covered += bool(low[0, 0] <= 1 <= high[0, 0])
    assert 925 <= covered <= 975


def test_components_of_a_known_plane():
    random = np.random.default_rng(3)
    plane = random.normal(size=(500, 2)) * [5, 2]
    directions = np.linalg.qr(random.normal(size=(6, 2)))[0].T
    found, parts = principal_components(plane @ directions + 7)
    for number in range(2):
        assert abs(np.corrcoef(found[:, number], plane[:, number])[0, 1]) > 0.99
    assert parts.sum() == pytest.approx(1)
    line, share = principal_components(np.arange(4.0)[:, None])
    assert (line[:, 1] == 0).all()
    np.testing.assert_allclose(share, [1, 0])


def test_variance_between_groups_by_hand():
    x = np.array([[0.0], [2.0], [4.0], [6.0]])
    units = np.array([0, 0, 1, 1])
    observed, null = variance_between(x, np.array([0, 1]), units, permutations=9, seed=0)
    assert observed == pytest.approx(16 / 20)
    np.testing.assert_allclose(null, 16 / 20)  # two documents: nothing to shuffle


def test_shuffled_groups_lie_as_far_apart_as_chance_has_it():
    random = np.random.default_rng(4)
    units = np.repeat(np.arange(30), 5)
    below = 0
    for seed in range(1_000):
        x = random.normal(size=(30, 2))[units] + random.normal(size=(150, 2))
        observed, null = variance_between(x, np.arange(30) % 3, units, permutations=39, seed=seed)
        below += (1 + (null >= observed).sum()) / 40 <= 0.1
    assert 70 <= below <= 130
