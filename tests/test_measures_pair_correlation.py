"""Rank correlation of two similarities of the same pairs."""

import numpy as np
import pytest
from scipy.stats import kstest, spearmanr

from moescope.measures.pair_correlation import mean_correlation, pair_correlation


def similarities(random, experts=8, shared=0.5):
    """Cosines of random vectors, and of others that are in part the same."""
    one, other = random.normal(size=(2, experts, 6))
    return np.corrcoef(one), np.corrcoef(shared * one + (1 - shared) * other)


def found(one, other, *, groups=32, permutations=99, seed=0):
    """With documents that change nothing."""
    estimates = np.repeat(other[None], 1 + groups, axis=0)
    return pair_correlation(one, estimates, permutations=permutations, seed=seed)


def test_against_plain_loops():
    random = np.random.default_rng(0)
    one, other = similarities(random)
    estimates = other + 0.1 * random.normal(size=(33, 8, 8))
    ours = pair_correlation(one, estimates, permutations=9, seed=0)

    def rho(left, right):
        above = np.triu_indices(len(left), 1)
        return spearmanr(left[above], right[above]).statistic

    assert ours.rho == pytest.approx(rho(one, estimates[0]))
    assert ours.without_documents == pytest.approx([rho(one, other) for other in estimates[1:]])
    rest = [np.delete(np.arange(8), expert) for expert in range(8)]
    expected = [rho(one[np.ix_(r, r)], estimates[0][np.ix_(r, r)]) for r in rest]
    assert ours.without_experts == pytest.approx(expected)
    assert ours.n_pairs == 28


def test_p_is_uniform_where_nothing_is_shared():
    random = np.random.default_rng(1)
    values = np.array(
        [found(*similarities(random, shared=0), permutations=199).p_value for _ in range(1_000)]
    )
    # p takes steps of 1/200: spread evenly within a step for the test of a continuous law.
    assert kstest(values - random.uniform(size=1_000) / 200, "uniform").pvalue > 0.01
    assert np.mean(values <= 0.05) == pytest.approx(0.05, abs=0.02)


@pytest.mark.parametrize("shared", [0.5])
def test_the_interval_holds_what_many_experts_have(shared):
    random = np.random.default_rng(2)
    above = np.triu_indices(800, 1)
    true = spearmanr(*(one[above] for one in similarities(random, 800, shared))).statistic
    inside = 0
    for _ in range(1_000):
        mean = mean_correlation([found(*similarities(random, 8, shared), permutations=1)])
        inside += mean.value_low <= true <= mean.value_high
    assert inside >= 930


def test_documents_that_differ_widen_the_interval():
    random = np.random.default_rng(3)
    one, other = similarities(random, experts=12)
    noisy = np.concatenate([other[None], other + 0.2 * random.normal(size=(32, 12, 12))])
    both = [found(one, other), pair_correlation(one, noisy, permutations=99, seed=0)]
    narrow, wide = (mean_correlation([layer]) for layer in both)
    assert narrow.value == wide.value
    assert wide.value_low < narrow.value_low < narrow.value_high < wide.value_high


def test_a_mean_over_layers_is_tested_with_all_layers_at_once():
    random = np.random.default_rng(4)
    layers = [found(*similarities(random, shared=0.35), permutations=999) for _ in range(6)]
    mean = mean_correlation(layers)
    assert mean.value == pytest.approx(np.mean([layer.rho for layer in layers]))
    assert mean.p_value < min(layer.p_value for layer in layers)
    alone = mean_correlation(layers[:1])
    assert mean.value_high - mean.value_low < alone.value_high - alone.value_low


@pytest.mark.parametrize(("experts", "groups"), [(4, 32), (8, 29)])
def test_too_few_have_no_interval(experts, groups):
    one, other = similarities(np.random.default_rng(5), experts)
    mean = mean_correlation([found(one, other, groups=groups)])
    assert np.isfinite(mean.value)
    assert np.isnan([mean.value_low, mean.value_high]).all()


def test_the_same_order_has_no_interval_and_no_variation_no_correlation():
    one, _ = similarities(np.random.default_rng(6))
    mean = mean_correlation([found(one, one**3)])
    assert mean.value == pytest.approx(1)
    assert np.isnan(mean.value_low)
    assert np.isnan(found(one, np.ones((8, 8))).rho)
