"""Neurons of two experts, matched: permuted copies, rotations, and nothing in common."""

from itertools import permutations

import numpy as np
import pytest
import torch
from scipy.linalg import orthogonal_procrustes

from moescope.measures.matching import (
    alike,
    gaussian_pairs,
    joined,
    matching,
    pairs_alike,
    permutation_tau,
    scrambled,
)


def expert(neurons=40, hidden=60, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [scale * torch.randn(neurons, hidden, generator=generator) for scale in (1, 2, 0.1)]


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_a_permuted_copy_is_matched_and_its_tau_known(noise):
    own = expert(neurons=5)
    order = [2, 0, 1, 4, 3]  # 3 of 10 pairs out of order: tau = 1 - 2 * 3 / 10
    generator = torch.Generator().manual_seed(9)
    copy = [m[np.argsort(order)] for m in own]
    copy = [m + noise * m.std() * torch.randn(m.shape, generator=generator) for m in copy]
    products = joined(own).rows @ joined(copy).rows.mT
    assert matching(products).tolist() == order
    found = alike(joined(own), joined(copy))
    assert found.tau == pytest.approx(0.4)
    assert found.matched == pytest.approx(
        1 if noise == 0 else 0.995, abs=1e-5 if noise == 0 else 0.003
    )
    assert found.in_order < 0.7


def test_a_permutation_that_fits_one_matrix_alone_is_not_enough():
    """Gate, up and down of a neuron go together: separate matchings find what is not there."""
    own = expert()
    turned = [
        m[torch.randperm(40, generator=torch.Generator().manual_seed(i))] for i, m in enumerate(own)
    ]
    separate = [alike(joined([a]), joined([b])).matched for a, b in zip(own, turned, strict=True)]
    assert min(separate) == pytest.approx(1, abs=1e-5)
    assert alike(joined(own), joined(turned)).matched < 0.6


def test_matching_is_the_best_of_all_permutations():
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        products = torch.randn(6, 6, generator=generator)
        best = max(sum(products[i, j] for i, j in enumerate(o)) for o in permutations(range(6)))
        found = products[torch.arange(6), torch.from_numpy(matching(products))].sum()
        assert float(found) == pytest.approx(float(best), abs=1e-6)


def test_an_expert_with_fewer_neurons_is_found_within_a_wider_one():
    wide = expert(neurons=40)
    part = [m[[7, 3, 30, 12]] for m in wide]
    # `joined` scales each matrix, so the part is compared with rows of other lengths.
    found = alike(joined(part), joined(wide))
    assert found.matched > 0.99
    assert np.isnan(found.in_order)


def test_every_matrix_counts_the_same():
    own, other = expert(), expert(seed=1)
    found = alike(joined(own), joined(other)).in_order
    cosines = [
        float(torch.cosine_similarity(a.flatten(), b.flatten(), dim=0))
        for a, b in zip(own, other, strict=True)
    ]
    assert found == pytest.approx(np.mean(cosines), abs=1e-6)


def test_a_rotation_of_neurons_is_seen_by_procrustes_and_cka_alone():
    own = expert()
    turn = torch.linalg.qr(torch.randn(40, 40, generator=torch.Generator().manual_seed(2)))[0]
    found = alike(joined(own), joined([turn @ m for m in own]))
    assert found.procrustes == pytest.approx(1, abs=1e-5)
    assert found.cka == pytest.approx(1, abs=1e-5)
    assert found.matched < 0.5


def test_procrustes_and_cka_against_other_implementations():
    own, other = joined(expert()), joined(expert(seed=1))
    found = alike(own, other)
    a, b = own.rows.double().numpy(), other.rows.double().numpy()
    turn, _ = orthogonal_procrustes(b.T, a.T)
    assert found.procrustes == pytest.approx(float((b.T @ turn * a.T).sum()), abs=1e-5)
    x, y = (m.T - m.T.mean(0) for m in (a, b))
    cka = np.linalg.norm(y.T @ x) ** 2 / np.linalg.norm(x.T @ x) / np.linalg.norm(y.T @ y)
    assert found.cka == pytest.approx(cka, abs=1e-5)
    assert found.matched <= found.procrustes


def test_tau():
    assert permutation_tau(np.arange(10)) == pytest.approx(1)
    assert permutation_tau(np.arange(10)[::-1]) == pytest.approx(-1)


def test_gaussians_gain_by_matching_though_nothing_is_there():
    pairs = gaussian_pairs((64, 64), 64, matrices=3, draws=10, seed=0)
    before = np.mean([pair.in_order for pair in pairs])
    after = np.mean([pair.matched for pair in pairs])
    assert abs(before) < 0.02
    assert 0.1 < after < 0.3
    assert pairs == gaussian_pairs((64, 64), 64, matrices=3, draws=10, seed=0)


def test_scrambling_keeps_an_expert_and_takes_away_what_it_shares():
    own = joined(expert())
    other = scrambled(own, 3, torch.Generator().manual_seed(0))
    assert torch.allclose(own.rows @ own.rows.mT, other.rows @ other.rows.mT, atol=1e-6)
    assert alike(own, own).matched == pytest.approx(1, abs=1e-5)
    assert alike(own, other).matched < 0.5


def test_pairs_are_those_asked_for():
    experts = {
        name: list(part)
        for name, part in zip("gud", zip(expert(), expert(seed=1), strict=True), strict=True)
    }
    found = pairs_alike(experts, experts, [(0, 0), (0, 1)])
    assert found[0].matched == pytest.approx(1, abs=1e-5)
    assert found[1] == alike(joined(expert()), joined(expert(seed=1)))
    mixed = pairs_alike(experts, experts, [(0, 0)], scramble=0)
    assert mixed[0].matched < 0.5


def test_one_neuron_has_no_order(recwarn):
    assert np.isnan(permutation_tau(np.array([0])))
    assert not recwarn.list
