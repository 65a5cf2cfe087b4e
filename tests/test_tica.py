"""TICA: the slow coordinate of a process in which it is known."""

import numpy as np
import pytest

from boltznce import UserError
from boltznce.analysis.tica import tica_projection


def walks(n, rng):
    """A slow autoregressive coordinate hidden under a fast one of ten times its size."""
    x = np.zeros((n, 2))
    for i in range(1, n):
        x[i] = np.array([0.99, 0.3]) * x[i - 1] + rng.normal(size=2)
    return x


def test_the_slow_coordinate_is_found():
    pytest.importorskip("deeptime")
    rng = np.random.default_rng(0)
    slow_fast = [walks(4000, rng) for _ in range(3)]
    mixed = [x @ np.array([[1.0, 0.5], [50.0, -40.0]]) for x in slow_fast]
    project = tica_projection(mixed, lag=10, n_components=1)
    found = project(mixed[0])[:, 0]
    assert abs(np.corrcoef(found, slow_fast[0][:, 0])[0, 1]) > 0.99
    assert abs(np.corrcoef(mixed[0][:, 0], slow_fast[0][:, 0])[0, 1]) < 0.5


def test_short_trajectories_are_told():
    pytest.importorskip("deeptime")
    with pytest.raises(UserError, match="lower"):
        tica_projection([np.zeros((5, 2))], lag=10)
