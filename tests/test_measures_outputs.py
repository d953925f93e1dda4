import itertools
import math

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from moescope.measures.outputs import (
    KINDS,
    angular,
    longest_chosen,
    longest_share,
    pair_means,
    partial_rank_correlations,
    rank_correlations,
    rank_counts,
    token_cosines,
)


def drawn(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def test_cosines_and_norms_are_those_of_each_pair():
    outputs = torch.from_numpy(drawn(4, 5, 6)).float()
    cosines, norms = token_cosines(outputs)
    for token in range(5):
        for one in range(4):
            assert norms[token, one].item() == pytest.approx(outputs[one, token].norm().item())
            for other in range(4):
                expected = torch.cosine_similarity(
                    outputs[one, token], outputs[other, token], 0
                ).item()
                assert cosines[token, one, other].item() == pytest.approx(expected, abs=1e-6)


def test_equal_opposite_and_orthogonal_outputs():
    along, across = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 0.5])
    outputs = torch.stack([along, 7 * along, -along, across])[:, None]
    cosines, _ = token_cosines(outputs)
    assert cosines[0, 0].tolist() == pytest.approx([1, 1, -1, 0])
    assert angular(cosines)[0, 0].tolist() == pytest.approx([1, 1, 0, 0.5])


def test_angular_bears_rounding():
    rounded = torch.tensor([1 + 1e-6, -1 - 1e-6, math.cos(1.0)])
    assert angular(rounded).tolist() == pytest.approx([1, 0, 1 - 1 / math.pi])


def test_outputs_of_zero_have_no_cosine():
    outputs = torch.tensor([[[0.0, 0.0]], [[1.0, 0.0]], [[1.0, 1.0]]])
    cosines, norms = token_cosines(outputs)
    assert cosines[0, 0].isnan().all()
    assert cosines[0, 1, 2].item() == pytest.approx(0.5**0.5)
    assert norms[0, 0] == 0
    found = pair_means(cosines, torch.tensor([[True, True, False]]))
    assert found[0].item() == pytest.approx(0.5**0.5)
    assert found[KINDS.index("both_chosen")].isnan()


@pytest.mark.parametrize("used", [0, 1, 2, 3, 5])
def test_pairs_by_how_many_of_the_two_were_used(used):
    values = torch.from_numpy(drawn(3, 5, 5))
    values = values + values.mT
    chosen = torch.zeros(3, 5, dtype=torch.bool)
    for token in range(3):
        chosen[token, torch.randperm(5)[:used]] = True
    found = pair_means(values, chosen)
    for token in range(3):
        kinds = {kind: [] for kind in KINDS}
        for one in range(5):
            for other in range(one):
                number = int(chosen[token, one]) + int(chosen[token, other])
                kinds[("none_chosen", "one_chosen", "both_chosen")[number]].append(
                    values[token, one, other].item()
                )
        kinds["all"] = list(itertools.chain(*kinds.values()))
        for number, kind in enumerate(KINDS):
            expected = np.mean(kinds[kind]) if kinds[kind] else math.nan
            assert found[number, token].item() == pytest.approx(expected, nan_ok=True)


def test_rank_correlations_are_scipys_with_ties():
    one = np.round(drawn(50, 8), 0)
    other = np.round(drawn(50, 8, seed=1), 0)
    expected = [spearmanr(a, b).statistic for a, b in zip(one, other, strict=True)]
    assert rank_correlations(one, other) == pytest.approx(np.array(expected))
    assert np.isnan(rank_correlations(np.ones((2, 4)), drawn(2, 4))).all()


def test_norms_that_follow_scores():
    scores = drawn(200, 8)
    norms = np.exp(scores) + 3
    chosen = scores >= np.sort(scores, axis=1)[:, [-2]]
    assert rank_correlations(scores, norms) == pytest.approx(np.ones(200))
    assert rank_correlations(scores, -norms) == pytest.approx(-np.ones(200))
    assert longest_chosen(norms, chosen).tolist() == [1.0] * 200
    assert longest_chosen(-norms, chosen).tolist() == [0.0] * 200
    counts = rank_counts(scores, norms, seed=0)
    assert counts.tolist() == (200 * np.eye(8, dtype=int)).tolist()


def test_outputs_that_tie_for_the_longest_share_it():
    norms = np.array([[2.0, 2.0, 1.0], [1.0, 1.0, 1.0]])
    assert longest_share(norms).tolist() == [[0.5, 0.5, 0], [pytest.approx(1 / 3)] * 3]
    chosen = np.array([[True, False, True], [False, False, False]])
    assert longest_chosen(norms, chosen).tolist() == pytest.approx([0.5, math.nan], nan_ok=True)


def test_ranks_by_hand():
    counts = rank_counts(np.array([[3.0, 1.0, 2.0]]), np.array([[5.0, 6.0, 4.0]]), seed=0)
    # Experts 1, 2, 0 by score have norm ranks 3, 1, 2.
    assert counts.tolist() == [[0, 0, 1], [1, 0, 0], [0, 1, 0]]


def test_ties_are_broken_at_random():
    counts = rank_counts(np.ones((6000, 3)), np.tile([1.0, 2.0, 3.0], (6000, 1)), seed=0)
    assert (counts.sum(0) == 6000).all()
    assert (counts.sum(1) == 6000).all()
    assert np.abs(counts - 2000).max() < 5 * math.sqrt(6000 * 2 / 9)


def planted(*, steady, moving, seed=0, tokens=4000, experts=6):
    """Norms and scores that share a part of each expert and a part of each token and expert."""
    random = np.random.default_rng(seed)
    own, noise = random.normal(size=experts), random.normal(size=(3, tokens, experts))
    norms = steady * own + noise[0] + moving * noise[2]
    scores = steady * own + noise[1] + moving * noise[2]
    return scores, norms, np.arange(tokens) % 40


def test_partial_correlation_by_regression():
    # An independent way: residuals after a regression on the mean norm ranks.
    scores, norms, documents = planted(steady=1.0, moving=0.7)
    found = partial_rank_correlations(scores, norms, documents)[0]
    score_ranks, norm_ranks = (x.argsort(1).argsort(1) - 2.5 for x in (scores, norms))
    control = np.broadcast_to(norm_ranks.mean(0), norm_ranks.shape).ravel()
    left = [
        ranks.ravel() - control * (ranks.ravel() @ control) / (control @ control)
        for ranks in (score_ranks, norm_ranks)
    ]
    assert found == pytest.approx(np.corrcoef(*left)[0, 1], abs=1e-9)


def test_what_experts_always_have_makes_no_partial_correlation():
    scores, norms, documents = planted(steady=2.0, moving=0.0)
    assert rank_correlations(scores, norms).mean() > 0.3
    assert abs(partial_rank_correlations(scores, norms, documents)[0]) < 0.02
    scores, norms, documents = planted(steady=2.0, moving=1.0)
    assert partial_rank_correlations(scores, norms, documents)[0] > 0.15


def test_an_expert_that_is_always_long_makes_no_partial_correlation():
    scores, norms, documents = planted(steady=0.0, moving=0.0)
    norms[:, 3] += 100
    assert abs(partial_rank_correlations(scores, norms, documents)[0]) < 0.02
    scores[:, 3] += 100  # and always preferred
    assert rank_correlations(scores, norms).mean() > 0.3
    assert abs(partial_rank_correlations(scores, norms, documents)[0]) < 0.02


def test_documents_are_left_out_in_turn():
    scores, norms, documents = planted(steady=0.5, moving=0.5)
    found = partial_rank_correlations(scores, norms, documents)
    assert len(found) == 41
    for document in (0, 7, 39):
        rest = documents != document
        renumbered = np.unique(documents[rest], return_inverse=True)[1]
        without = partial_rank_correlations(scores[rest], norms[rest], renumbered)[0]
        assert found[1 + document] == pytest.approx(without)


def test_nothing_to_correlate():
    documents = np.zeros(5, dtype=np.int64)
    alike = partial_rank_correlations(drawn(5, 3), np.ones((5, 3)), documents)
    assert math.isnan(alike[0])
    steady = np.tile([1.0, 2.0, 3.0], (5, 1))  # an expert is as long as ever
    assert math.isnan(partial_rank_correlations(drawn(5, 3), steady, documents)[0])
