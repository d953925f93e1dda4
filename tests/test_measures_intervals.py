import numpy as np
import pytest

from moescope.measures.intervals import Estimate, difference, mean


def estimate(value, low, high):
    return Estimate(*(np.asarray(part, dtype=float) for part in (value, low, high)))


def test_symmetric_limits_add_as_variances_do():
    found = difference(estimate(1.0, 0.7, 1.3), estimate(3.0, 2.6, 3.4))
    assert [float(part) for part in found] == pytest.approx([2.0, 1.5, 2.5])  # 3, 4, 5


def test_each_side_brings_the_limit_that_faces_the_other():
    one, other = estimate(1.0, 0.9, 1.3), estimate(3.0, 2.6, 3.1)
    found = difference(one, other)
    assert [float(part) for part in found] == pytest.approx([2.0, 1.5, 2.0 + np.hypot(0.1, 0.1)])


def test_no_limits_stay_none():
    found = difference(estimate(1.0, np.nan, np.nan), estimate(3.0, 2.6, 3.4))
    assert found.value == 2
    assert np.isnan(found.low)
    assert np.isnan(found.high)


def test_limits_of_a_difference_cover_as_they_say():
    random = np.random.default_rng(0)
    errors = random.normal(size=(2, 4_000)) * [[1.0], [0.3]]
    one = Estimate(errors[0], errors[0] - 1.96, errors[0] + 1.96)
    other = Estimate(2 + errors[1], 2 + errors[1] - 0.588, 2 + errors[1] + 0.588)
    found = difference(one, other)
    covered = ((found.low < 2) & (found.high > 2)).mean()
    assert covered == pytest.approx(0.95, abs=3 * np.sqrt(0.95 * 0.05 / 4_000))


def test_mean_is_as_wide_as_its_parts_are():
    found = mean(estimate([1.0, 3.0], [0.0, 2.5], [2.0, 4.0]))
    assert [float(part) for part in found] == [2.0, 1.25, 3.0]
