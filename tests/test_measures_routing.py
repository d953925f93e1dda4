import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.distance import jensenshannon
from scipy.stats import binomtest, entropy, kstest

from moescope.measures import routing

counts = st.lists(st.integers(0, 1_000), min_size=6, max_size=6).filter(any).map(np.array)


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_counts_by_hand(dtype):
    found = np.zeros((2, 3), dtype=dtype)
    documents = np.array([0, 0, 1])
    routing.count_experts(found, documents, np.array([[0, 1], [1, 2], [0, -1]]))
    np.testing.assert_array_equal(found, [[1, 2, 1], [1, 0, 0]])
    routing.count_experts(found, documents, np.array([[2], [2], [2]]))
    np.testing.assert_array_equal(found, [[1, 2, 3], [1, 0, 1]])


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
    observed, null, matched = routing.divergence_test(
        np.vstack([first, second]), labels, permutations=200, seed=0
    )
    assert observed == pytest.approx(1)
    assert 10 * 16 <= matched <= 10 * 18  # ten documents of either size
    assert (null < observed).all()


def test_matching_removes_the_advantage_of_small_samples():
    random = np.random.default_rng(2)
    large, small = np.array([4_000] * 8), random.multinomial(40, np.ones(8) / 8)
    plain = routing.jensen_shannon_bits(large, small)
    pairs = [np.tile(side, (2_000, 1)) for side in (large, small)]
    matched = routing.matched_divergence(*pairs, random).mean()
    both_small = np.mean(
        [
            routing.jensen_shannon_bits(
                random.multinomial(40, np.ones(8) / 8), random.multinomial(40, np.ones(8) / 8)
            )
            for _ in range(2_000)
        ]
    )
    assert plain < matched < 2 * both_small


def p_value(counts, in_second, **options):
    observed, null, _ = routing.divergence_test(counts, in_second, **options)
    return (1 + (null >= observed).sum()) / (1 + len(null))


def test_p_values_of_shuffled_domains_keep_their_level():
    """1,000 sets of documents whose domain means nothing: as many p-values below each level."""
    random = np.random.default_rng(3)
    labels = np.array([0] * 8 + [1] * 14)
    p_values = []
    for seed in range(1_000):
        topics = random.dirichlet(np.full(4, 2.0), size=22)
        documents = random.multinomial(random.integers(5, 60, size=22), topics)
        p_values.append(p_value(documents, labels, permutations=59, seed=seed))
    assert kstest(np.array(p_values) - random.random(1_000) / 60, "uniform").pvalue > 0.001
    for level in (0.05, 0.1, 0.25, 0.5, 0.75):
        below = sum(p <= level for p in p_values)
        assert binomtest(below, 1_000, level).pvalue > 0.001, level


@pytest.mark.parametrize("sizes", [(30, 500), (500, 30)], ids=["few short", "few long"])
@pytest.mark.parametrize("topics", [5.0, 500.0], ids=["unlike", "alike"])
def test_short_documents_are_no_difference_between_domains(sizes, topics):
    """The same routing in a domain of few and one of many documents, of other lengths."""
    random = np.random.default_rng(5)
    labels = np.array([0] * 10 + [1] * 40)
    below = 0
    for seed in range(300):
        use = random.dirichlet(np.full(6, topics), size=50)
        documents = random.multinomial(np.array(sizes)[labels], use)
        below += p_value(documents, labels, permutations=39, seed=seed) <= 0.1
    assert below <= 50  # 30 expected; once they were all, or nearly


def test_drawing_down_is_the_multivariate_hypergeometric():
    random = np.random.default_rng(4)
    large, size = np.array([50, 30, 15, 5]), 20
    drawn = routing._drawn_down(np.tile(large, (20_000, 1)), np.full(20_000, size), random)
    assert (drawn.sum(1) == size).all()
    assert (drawn <= large).all()
    part = large / large.sum()
    np.testing.assert_allclose(drawn.mean(0), size * part, atol=0.05)
    spread = size * part * (1 - part) * (100 - size) / 99
    np.testing.assert_allclose(drawn.var(0), spread, rtol=0.05)


def test_busiest_share_by_hand():
    counts = np.array([[5, 1, 3, 1], [0, 0, 0, 0]])
    np.testing.assert_array_equal(routing.busiest_share(counts, 2), [0.8, 0])
