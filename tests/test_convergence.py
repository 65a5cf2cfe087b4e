"""How long a simulation has to be: independent frames, for which the answer is known, and correlated ones."""

import numpy as np
import pytest

from boltznce import UserError
from boltznce.analysis.convergence import error_constant, frames_for_error


def test_independent_frames():
    """The variance of ΔF from n of them is 1 / (n p (1 - p))."""
    rng = np.random.default_rng(0)
    for p in (0.5, 0.2):
        inside = rng.random((16, 4096)) < p
        expected = (p * (1 - p)) ** -0.5
        assert error_constant(inside) == pytest.approx(expected, rel=0.1)
        assert frames_for_error(inside, 0.1) == pytest.approx(100 * expected**2, rel=0.2)


def test_frames_that_repeat_cost_as_many_more():
    rng = np.random.default_rng(1)
    inside = np.repeat(rng.random((16, 1024)) < 0.3, 8, axis=1)
    assert frames_for_error(inside, 0.1) == pytest.approx(8 * 100 / (0.3 * 0.7), rel=0.3)


def test_a_side_never_seen_is_told():
    with pytest.raises(UserError, match="one side"):
        error_constant(np.zeros((2, 100), dtype=bool))
