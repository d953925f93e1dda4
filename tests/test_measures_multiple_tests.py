import numpy as np
import pytest

from moescope.measures.multiple_tests import holm


def test_holm_by_hand():
    assert holm(np.array([0.01, 0.04, 0.03])).tolist() == pytest.approx([0.03, 0.06, 0.06])
    assert holm(np.array([0.9, 0.5])).tolist() == [1.0, 1.0]


def test_what_is_no_test_does_not_count():
    found = holm(np.array([0.02, np.nan, 0.03]))
    assert found[[0, 2]].tolist() == pytest.approx([0.04, 0.04])
    assert np.isnan(found[1])
    assert np.isnan(holm(np.array([np.nan]))).all()
