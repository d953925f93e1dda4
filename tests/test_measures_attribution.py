from itertools import permutations

import numpy as np
import pytest
import torch
from torch import nn

from moescope.measures.attribution import Norm, orders, shuffle_p_values, shuffled_means

HIDDEN = 24


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def norms():
    layer, rms = nn.LayerNorm(HIDDEN, eps=1e-3), nn.RMSNorm(HIDDEN, eps=1e-3)
    with torch.no_grad():
        layer.weight.copy_(numbers(HIDDEN))
        layer.bias.copy_(numbers(HIDDEN, seed=1))
        rms.weight.copy_(numbers(HIDDEN, seed=2))
    return {"layer": layer, "rms": rms}


@pytest.mark.parametrize("name", ["layer", "rms"])
@torch.no_grad()
def test_a_norm_is_read_off_and_its_scale_found(name):
    module = norms()[name]
    norm = Norm.of(module, HIDDEN)
    assert norm.centred == (name == "layer")
    torch.testing.assert_close(norm.gain, module.weight, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(norm.bias, module.bias if name == "layer" else torch.zeros(HIDDEN))
    x = 0.1 * numbers(5, HIDDEN, seed=3) + 0.2  # so small that epsilon counts
    rates, left = norm.rates(x, module(x))
    centred = x - x.mean(1, keepdim=True) if name == "layer" else x
    torch.testing.assert_close(rates, (centred.square().mean(1) + 1e-3).rsqrt(), rtol=1e-4, atol=0)
    assert left.max() < 1e-5
    parts = numbers(4, 5, HIDDEN, seed=4)
    parts[-1] = x - parts[:-1].sum(0)
    torch.testing.assert_close(
        (rates[:, None] * norm.fixed(parts)).sum(0) + norm.bias, module(x), rtol=1e-3, atol=1e-4
    )


@torch.no_grad()
def test_what_is_no_such_norm_leaves_a_rest():
    class Bent(nn.RMSNorm):
        def forward(self, x):
            return super().forward(x).tanh()

    module = Bent(HIDDEN)
    x = numbers(5, HIDDEN)
    _, left = Norm.of(module, HIDDEN).rates(x, module(x))
    assert left.min() > 0.05


def test_what_was_observed_reaches_itself_also_below_zero():
    p, corrected = shuffle_p_values(np.array([-1.0]), np.array([[0.0, 1.0, 2.0]]))
    assert p.tolist() == corrected.tolist() == [1.0]
    p, _ = shuffle_p_values(np.array([2.0]), np.array([[0.0, 1.0, -2.0]]))
    assert p.tolist() == [0.25]


def test_shuffled_means_are_those_of_the_permuted_answers():
    values = np.arange(9.0).reshape(3, 3) ** 2
    every = np.array(list(permutations(range(3))))
    expected = [np.mean([values[i, order[i]] for i in range(3)]) for order in every]
    np.testing.assert_allclose(shuffled_means(values, every), expected)
    drawn = orders(5, 200, seed=0)
    assert (np.sort(drawn, 1) == np.arange(5)).all()
    assert len(np.unique(drawn, axis=0)) > 70  # of 120


def test_p_values_by_hand():
    observed = np.array([3.0, 0.0, 1.0])
    drawn = np.array([[0.0, 1.0, 2.0], [0.0, 0.0, 0.0], [2.0, 1.0, 0.0]])
    p, corrected = shuffle_p_values(observed, drawn)
    np.testing.assert_allclose(p, [1 / 4, 1, 3 / 4])  # what was observed is one of four
    # In units of their spread the largest of each shuffle are 1.34, 1.41, 0 and 0.45.
    np.testing.assert_allclose(corrected, [2 / 4, 1, 1])


def test_what_belongs_to_prompts_or_answers_alone_says_nothing():
    values = np.random.default_rng(0).normal(size=(12, 12))
    moved = values + 5 * np.arange(12)[:, None] - 3 * np.arange(12)
    shuffled = orders(12, 200, seed=1)

    def p(v):
        return shuffle_p_values(np.array([np.diag(v).mean()]), shuffled_means(v, shuffled)[None])

    np.testing.assert_allclose(p(values), p(moved))


def test_p_values_are_calibrated():
    generator = np.random.default_rng(0)
    shuffled = orders(10, 99, seed=2)
    single, corrected = [], []
    for _ in range(1_000):
        # Experts that share what they do with a prompt, as those of a model may.
        values = generator.exponential(size=(4, 10, 10)) + generator.normal(size=(1, 10, 10))
        observed = np.array([np.diag(v).mean() for v in values])
        drawn = np.array([shuffled_means(v, shuffled) for v in values])
        p = shuffle_p_values(observed, drawn)
        single.append(p[0][0])
        corrected.append(p[1].min())
    for found in (single, corrected):
        for level in (0.05, 0.2, 0.5):
            share = np.mean(np.array(found) <= level)
            assert abs(share - level) < 4 * np.sqrt(level * (1 - level) / 1_000)
