import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import mutual_info_score

from moescope.measures.decisions import (
    common_excess_test,
    design_effect,
    margins,
    mutual_information_bits,
    paired_divergence_test,
    zero_mean_p_value,
)
from moescope.measures.expert_runs import Passages, stays
from moescope.measures.routing import jensen_shannon_bits


def test_margins_by_hand():
    logits = np.array([[3.0, 1.0, 2.5, 0.0]] * 4)
    experts = np.array([[0, 2], [0, 1], [0, -1], [-1, -1]])
    found = margins(logits, experts)
    assert found[:3].tolist() == [1.5, -1.5, 0.5]
    assert np.isnan(found[3])
    assert np.isnan(margins(logits, np.tile(np.arange(4), (4, 1)))).all()


def test_mutual_information_is_that_of_sklearn():
    random = np.random.default_rng(0)
    labels, experts = random.integers(0, 5, 400), random.integers(0, 3, 400)
    experts[labels == 2] = 0
    counts = np.zeros((2, 5, 3), dtype=np.int32)
    np.add.at(counts[1], (labels, experts), 1)
    counts[0] = 7  # any label with any expert
    found = mutual_information_bits(counts)
    assert found[0] == pytest.approx(0, abs=1e-12)
    assert found[1] == pytest.approx(mutual_info_score(labels, experts) / np.log(2))


def test_swapped_documents_are_a_fair_null():
    """No difference between the two kinds: p-values are uniform, over 1,000 draws."""
    random = np.random.default_rng(3)
    p_values = []
    for seed in range(1_000):
        taste = random.dirichlet(np.ones(4), size=12)
        one, other = (np.stack([random.multinomial(9, p) for p in taste]) for _ in range(2))
        found, null = paired_divergence_test(one, other, permutations=99, seed=seed)
        # Ties are broken at random, as p-values of a few discrete counts have many.
        larger, equal = (null > found + 1e-12).sum(), (abs(null - found) <= 1e-12).sum()
        p_values.append((larger + random.integers(0, 1 + equal, endpoint=False) + 0.5) / 100)
    assert stats.kstest(p_values, "uniform").pvalue > 0.01
    assert 0.03 < np.mean(np.array(p_values) <= 0.05) < 0.07


def test_a_planted_difference_is_found():
    one = np.tile([5, 5, 0], (20, 1))
    other = np.tile([0, 5, 5], (20, 1))
    found, null = paired_divergence_test(one, other, permutations=199, seed=0)
    assert found == pytest.approx(jensen_shannon_bits(one.sum(0), other.sum(0)))
    assert (null < found).all()


def test_no_expert_is_flagged_where_documents_choose_theirs_alone():
    """Documents that lean on experts of their own: flagged at most as often as said."""
    random = np.random.default_rng(5)
    domain_of = np.repeat([0, 1], 10)
    least, alone = [], []
    for seed in range(1_000):
        sizes = random.integers(5, 60, size=20)
        taste = random.dirichlet(np.full(4, 0.3), size=20)
        counts = np.stack([random.multinomial(n, p) for n, p in zip(sizes, taste, strict=True)])
        least.append(common_excess_test(counts, domain_of, permutations=39, seed=seed)[0].min())
        alone.append(common_excess_test(counts, 0 * domain_of, permutations=39, seed=seed)[0].min())
    assert np.mean(np.array(least) <= 0.05) <= 0.05
    # With one domain there is nothing to agree about: the level is met, not only kept.
    assert 0.03 < np.mean(np.array(alone) <= 0.05) < 0.07


def test_experts_of_one_domain_are_not_overloaded_but_those_of_all_are():
    domain_of = np.repeat([0, 1], 30)
    own = np.where(domain_of[:, None] == 0, [20, 20, 10, 0, 0, 0], [0, 0, 0, 20, 20, 10])
    p_values, _ = common_excess_test(own, domain_of, permutations=199, seed=0)
    assert (p_values == 1).all()
    shared = own + np.array([0, 60, 0, 0, 0, 0])
    p_values, signs = common_excess_test(shared, domain_of, permutations=199, seed=0)
    assert p_values[1] == 1 / 200
    assert signs[1] == 1
    assert (signs[[2, 5]] == -1).all()


def test_shuffled_passages_are_told_from_others_as_rarely_as_said():
    """Passages of unequal length and taste, in random order: 1,000 draws of 60 documents."""
    random = np.random.default_rng(4)
    p_values = []
    for _ in range(1_000):
        lengths = random.integers(2, 40, size=60)
        passages = Passages.of(np.repeat(np.arange(60), lengths))
        used = (
            random.random((lengths.sum(), 3)) < random.beta(1, 2, size=(60, 3))[passages.of_token]
        )
        found = stays(used, passages)
        p_values.append(zero_mean_p_value((found.stayed - found.shuffled).sum(1)))
    assert 0.03 < np.mean(np.array(p_values) <= 0.05) < 0.07
    assert stats.kstest(p_values, "uniform").pvalue > 0.01
    assert zero_mean_p_value(np.zeros(60)) == 1
    assert zero_mean_p_value(np.ones(60)) < 1e-12


def test_design_effect_of_independent_and_of_repeated_tokens():
    random = np.random.default_rng(2)
    counts = random.multinomial(50, np.full(5, 0.2), size=2_000)
    assert design_effect(counts, np.full(2_000, 50)) == pytest.approx(1, abs=0.05)
    repeated = 50 * random.multinomial(1, np.full(5, 0.2), size=2_000)
    assert design_effect(repeated, np.full(2_000, 50)) == pytest.approx(50, rel=0.02)
    assert design_effect(np.full((4, 3), 5), np.full(4, 5)) == 1  # all use all
