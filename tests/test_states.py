"""States on the circle and on the line."""

import numpy as np
import pytest
import torch

from boltznce.errors import UserError
from boltznce.states import State, in_interval


@pytest.mark.parametrize("kind", [np.array, torch.tensor])
@pytest.mark.parametrize(
    ("interval", "values", "inside"),
    [
        ((0.0, 2.0), [-0.1, 0.0, 1.0, 2.0, 2.1, 1.0 - 2 * np.pi], [False, False, True, False, False, True]),
        ((3.0, 3.5), [3.1, -3.1, -2.0], [True, True, False]),
        ((-4.0, -3.0), [3.1, -3.1, 0.0, 2.0], [True, True, False, False]),
        ((0.0, np.inf), [-10.0, 0.0, 10.0], [False, False, True]),
        ((-np.inf, -1.0), [-10.0, -1.0, 10.0], [True, False, False]),
    ],
)
def test_intervals(kind, interval, values, inside):
    np.testing.assert_array_equal(in_interval(kind(values), interval), inside)
    mask = State("phi", interval).contains(kind(values))
    np.testing.assert_array_equal(mask, inside)
    assert isinstance(mask, torch.Tensor) == (kind is torch.tensor)


@pytest.mark.parametrize("interval", [(2.0, 0.0), (0.0, 115.0), (-np.inf, np.inf), (1.0, 1.0)])
def test_no_interval(interval):
    with pytest.raises(UserError, match="shorter than the circle"):
        in_interval(np.zeros(0), interval)


def test_centre_and_words():
    assert State.of(["phi", [0, 2]]) == ("phi", (0.0, 2.0))
    assert [State("phi", interval).centre for interval in ((0.0, 2.0), (2.5, 4.5))] == pytest.approx(
        [1.0, 3.5 - 2 * np.pi]
    )
    assert State("phi", (np.pi - 1, np.pi + 1)).centre == pytest.approx(np.pi)
    with pytest.raises(UserError, match="half line"):
        _ = State("x", (0.0, np.inf)).centre
    assert State("phi", (0.0, 2.0)).in_words("φ") == "0 < φ < 2 rad"
    assert State("x", (0.0, np.inf)).in_words() == "x > 0"
    assert State("x", (-np.inf, 1.5)).in_words() == "x < 1.5"
