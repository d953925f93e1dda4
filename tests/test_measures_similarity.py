"""Likeness of experts as matrices: against plain loops, and where the answer is known."""

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

from moescope.measures.similarity import (
    centred,
    components,
    cosines,
    dimensions,
    inner_products,
    neuron_covariance,
    neuron_means,
    row_cosines,
    squared_norms,
)


def matrices(experts, neurons=50, hidden=300, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randn(experts, neurons, hidden, generator=generator).to(dtype))


def all_pairs(one, other):
    return cosines(inner_products(one, other), squared_norms(one), squared_norms(other))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("turned", [False, True])
def test_cosines_are_those_of_a_loop(dtype, turned):
    one, other = matrices(3, dtype=dtype), matrices(4, seed=1, dtype=dtype)
    if turned:  # columns in one piece, as with down
        one, other = ([m.mT.contiguous().mT for m in side] for side in (one, other))
    expected = [
        [torch.cosine_similarity(a.double().flatten(), b.double().flatten(), dim=0) for b in other]
        for a in one
    ]
    assert torch.allclose(all_pairs(one, other), torch.tensor(expected), atol=1e-7)
    assert torch.allclose(inner_products(one, one), inner_products(one, list(one)), rtol=1e-6)


def test_layouts_may_differ():
    one = matrices(2)
    turned = [m.mT.contiguous().mT for m in one]
    assert torch.allclose(all_pairs(one, turned).diagonal(), torch.ones(2).double(), atol=1e-7)


def test_copies_have_cosine_one_and_zeros_none():
    matrix = matrices(1)[0]
    found = all_pairs([matrix, -2 * matrix, torch.zeros_like(matrix)], [matrix])
    assert found[0, 0] == pytest.approx(1, abs=1e-7)
    assert found[1, 0] == pytest.approx(-1, abs=1e-7)
    assert found[2, 0].isnan()
    assert found[:2].abs().max() <= 1


def test_means_of_neurons():
    experts = matrices(5, dtype=torch.bfloat16)
    means = neuron_means(experts)
    assert torch.allclose(means[3], experts[3].double().mean(0))
    a, b = means[1], means[4]
    assert row_cosines(means)[1, 4] == pytest.approx(float(a @ b / a.norm() / b.norm()), abs=1e-12)


def test_centring_takes_out_what_is_common():
    generator = torch.Generator().manual_seed(0)
    own = torch.randn(6, 200, generator=generator, dtype=torch.float64)
    shifted = own + 50 * torch.randn(200, generator=generator, dtype=torch.float64)
    assert row_cosines(shifted).min() > 0.99
    assert torch.allclose(row_cosines(centred(shifted)), row_cosines(centred(own)), atol=1e-9)


def test_components_are_those_of_a_principal_component_analysis():
    experts = matrices(7)
    places, shares = components(inner_products(experts, experts))
    flat = torch.stack(experts).flatten(1).double().numpy()
    reference = PCA().fit(flat)
    expected = reference.transform(flat)[:, :2]
    signs = np.sign((places.numpy() * expected).sum(0))
    np.testing.assert_allclose(places.numpy() * signs, expected, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(shares[:6], reference.explained_variance_ratio_[:6], rtol=1e-4)


def test_covariance_of_neurons():
    experts = [m + 3 for m in matrices(4, hidden=20)]
    expected = np.cov(torch.cat(experts).double().numpy().T, bias=True)
    np.testing.assert_allclose(neuron_covariance(experts), expected, rtol=1e-4, atol=1e-5)


def test_dimensions():
    assert dimensions(torch.eye(9).double()) == pytest.approx(9)
    line = torch.outer(torch.ones(9), torch.ones(9)).double()
    assert dimensions(line) == pytest.approx(1)
    covariance = neuron_covariance(matrices(8, neurons=64, hidden=128, seed=3))
    assert dimensions(covariance) == pytest.approx(128 / (1 + 128 / 512), rel=0.02)


@pytest.mark.parametrize("experts", [3, 7, 8])
def test_equal_rows_have_nothing_left_that_could_be_alike(experts):
    row = torch.randn(1, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert row_cosines(centred(row.expand(experts, -1))).isnan().all()
