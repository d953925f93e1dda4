"""Differences of losses from others, and from random draws."""

import numpy as np
import pandas as pd
import pytest

from moescope.evaluate.draws import one_more_draw
from moescope.evaluate.totals import Resampling, difference_reach


def compared_with_draws(levels, random, documents=40):
    """A difference from each of some draws, and documents that scatter about them."""
    noise = random.normal(0, 0.3, documents)
    each = levels[0] - levels[1:]
    frame = pd.DataFrame({"tokens": 1.0, "difference": each.mean() + noise - noise.mean()})
    return one_more_draw(each, frame, Resampling(resamples=20, seed=0))


def test_one_more_random_draw_is_seldom_taken_for_more():
    """However many documents: the best of six equal ones is best on all of them."""
    random = np.random.default_rng(0)
    found = [compared_with_draws(random.normal(0, 1, 6), random) for _ in range(1_000)]
    taken = np.array([one.p_value < 0.05 for one in found])
    assert 0.033 < taken.mean() < 0.069  # 99% of what 5% give
    np.testing.assert_array_equal(taken, [one.low > 0 or one.high < 0 for one in found])


def test_what_is_far_from_all_draws_is_told_from_them():
    random = np.random.default_rng(0)
    found = compared_with_draws(np.array([-1, 0.01, 0, -0.01, 0.02, -0.02]), random)
    assert found.high < 0
    assert found.p_value < 1e-6
    alone = compared_with_draws(np.array([-1.0, 0.0]), random)
    few = compared_with_draws(np.array([-1.0, 0.0, 0.1]), random, documents=29)
    for one in (alone, few):
        assert np.isnan([one.low, one.high, one.p_value]).all()


def test_with_equal_draws_only_documents_are_left():
    random = np.random.default_rng(0)
    difference = random.normal(0.1, 1, 50)
    frame = pd.DataFrame({"tokens": 1.0, "difference": difference})
    resampling = Resampling(resamples=100, seed=0)
    found = one_more_draw(np.full(5, difference.mean()), frame, resampling)
    reach = difference_reach(difference, np.ones(50), resampling)
    assert (found.high - found.low) / 2 == pytest.approx(reach)
