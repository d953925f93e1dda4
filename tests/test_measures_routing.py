import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.distance import jensenshannon
from scipy.stats import entropy, kstest

from moescope.measures import routing

counts = st.lists(st.integers(0, 1_000), min_size=6, max_size=6).filter(any).map(np.array)


def test_counts_by_document_by_hand():
    experts = np.array([[0, 1], [1, 2], [0, 2]])
    documents = np.array([0, 0, 1])
    expected = [[1, 2, 1], [1, 0, 1]]
    np.testing.assert_array_equal(routing.counts_by_document(experts, documents, 2, 3), expected)


@given(counts, counts)
def test_entropy_and_divergence_against_scipy(p, q):
    assert routing.entropy_bits(p) == pytest.approx(entropy(p, base=2), abs=1e-9)
    expected = jensenshannon(p, q, base=2) ** 2
    assert routing.jensen_shannon_bits(p, q) == pytest.approx(expected, abs=1e-7)


def test_router_entropy_of_even_and_decided_logits():
    logits = np.array([[1.0, 1.0, 1.0, 1.0], [900.0, 0.0, 0.0, 0.0]])
    np.testing.assert_allclose(routing.router_entropy_bits(logits), [2, 0], atol=1e-9)


@pytest.mark.parametrize(("used", "expected"), [([5, 5, 5, 5], 2), ([97, 1, 1, 1], 1)])
def test_experts_for_half(used, expected):
    assert routing.experts_for_share(np.array(used)) == expected


def test_disjoint_domains_have_one_bit_and_the_smallest_p():
    first, second = np.array([[9, 9, 0, 0]] * 10), np.array([[0, 0, 8, 8]] * 12)
    labels = np.array([0] * 10 + [1] * 12)
    observed, null = routing.divergence_test(
        np.vstack([first, second]), labels, permutations=200, seed=0
    )
    assert observed == pytest.approx(1)
    assert (null < observed).all()


def test_p_values_are_uniform_when_labels_mean_nothing():
    random = np.random.default_rng(1)
    labels = np.array([0] * 15 + [1] * 25)
    p_values = []
    for seed in range(300):
        # Documents differ in length and in topic, but not by label.
        topics = random.dirichlet(np.ones(6), size=40)
        lengths = random.integers(20, 300, size=40)
        documents = np.array(
            [random.multinomial(n, t) for n, t in zip(lengths, topics, strict=True)]
        )
        observed, null = routing.divergence_test(documents, labels, permutations=99, seed=seed)
        p_values.append((1 + (null >= observed).sum()) / 100)
    assert kstest(p_values, "uniform").pvalue > 0.01


def test_matching_removes_the_advantage_of_small_samples():
    random = np.random.default_rng(2)
    large, small = np.array([4_000] * 8), random.multinomial(40, np.ones(8) / 8)
    plain = routing.jensen_shannon_bits(large, small)
    matched = routing.matched_divergence(large, small, random, 200)
    both_small = np.mean(
        [
            routing.jensen_shannon_bits(
                random.multinomial(40, np.ones(8) / 8), random.multinomial(40, np.ones(8) / 8)
            )
            for _ in range(2_000)
        ]
    )
    assert plain < matched < 2 * both_small
