"""Bennett's acceptance ratio in each state (tests/test_coverage_bar.py looks at its intervals)."""

import numpy as np
import pytest
from pymbar import other_estimators
from two_sided import FRAMES, KNOWN, KNOWN_OF_FOUR, estimate, estimate_of_four

from boltznce import UserError
from boltznce.analysis.bar import two_sided_free_energy_difference, two_sided_states


@pytest.mark.parametrize("frames", FRAMES)
def test_known_answer(frames):
    found = estimate(np.random.default_rng(0), frames, n_exact=2000, n_frames=2000, n_draws=20_000)
    assert found.reliable
    assert 0.02 < found.std_error < 0.08
    assert abs(found.value - KNOWN) < 3 * found.std_error
    assert found.interval == pytest.approx([found.value - 1.96 * found.std_error, found.value + 1.96 * found.std_error])


def given(rng, n=400):
    """Angles of draws, log ratios of these and of frames, as many on each side."""
    angle = np.repeat([1.0, -1.0], n)
    return angle, rng.normal(1.0, 1.2, 2 * n), rng.normal(-0.5, 1.2, 2 * n)


def test_as_pymbar_has_it():
    """On each side the same free energy and error, the flow's populations beside them."""
    angle, draws, frames = given(np.random.default_rng(1))
    found = two_sided_free_energy_difference(angle, np.arange(800), draws, angle, frames)
    sides = [other_estimators.bar(draws[side], -frames[side]) for side in (angle > 0, angle < 0)]
    assert found.value == pytest.approx(sides[0]["Delta_f"] - sides[1]["Delta_f"], abs=1e-6)
    variance = sum(side["dDelta_f"] ** 2 for side in sides) + 2 / 400
    assert found.std_error == pytest.approx(np.sqrt(variance), rel=0.01)
    twice = two_sided_free_energy_difference(np.append(angle, angle[:400]), np.arange(800), draws, angle, frames)
    assert twice.value == pytest.approx(found.value - np.log(2))


def test_weights_are_repeats_and_groups_are_counted_once():
    angle, draws, frames = given(np.random.default_rng(2))
    repeats = np.random.default_rng(3).integers(1, 4, 800)
    weighted = {"frames_log_weights": np.log(repeats)}
    one = two_sided_free_energy_difference(angle, np.arange(800), draws, angle, frames, **weighted)
    index = np.repeat(np.arange(800), repeats)
    other = two_sided_free_energy_difference(angle, np.arange(800), draws, angle[index], frames[index], groups=index)
    for name in ("value", "std_error", "seen_state", "ess_rest", "overlap_rest"):
        assert getattr(one, name) == pytest.approx(getattr(other, name))
    naive = two_sided_free_energy_difference(angle, np.arange(800), draws, angle[index], frames[index])
    assert naive.std_error < one.std_error


def test_what_a_walker_says_of_both_sides_has_errors_in_common():
    """A walker whose frames are alike on both sides tells of a constant, which cancels."""
    angle, draws, _ = given(np.random.default_rng(6), n=2000)
    shift = np.random.default_rng(7).normal(size=100)
    walkers = np.tile(np.arange(100), 40)
    alike = {"groups": walkers, "frames_log_ratio": shift[walkers] - 0.5}
    other = alike | {"groups": walkers + 100 * (angle > 0)}
    one, two = (
        two_sided_free_energy_difference(angle, np.arange(4000), draws, angle, **frames) for frames in (alike, other)
    )
    assert one.value == two.value
    assert one.std_error < 0.96 * two.std_error


def test_energies_without_bounds():
    angle, draws, frames = given(np.random.default_rng(8))
    sound = two_sided_free_energy_difference(angle, np.arange(800), draws, angle, frames)
    draws[::7], frames[::9] = 1e20, -np.inf
    found = two_sided_free_energy_difference(angle, np.arange(800), draws, angle, frames)
    assert found.value == pytest.approx(sound.value, abs=0.3)
    draws[:] = 1e20
    assert not two_sided_free_energy_difference(angle, np.arange(800), draws, angle, frames).reliable


def test_what_the_flow_does_not_cover():
    """Frames without a density of the flow count: their part of the state is missing from its draws."""
    angle, draws, frames = given(np.random.default_rng(4), n=2000)
    whole = two_sided_free_energy_difference(angle, np.arange(4000), draws, angle, frames)
    half, lost = frames.copy(), np.arange(4000) % 2 == 0
    half[lost & (angle > 0)] = -np.inf
    draws[:20] = np.inf  # no energy
    found = two_sided_free_energy_difference(angle, np.arange(4000), draws, angle, half)
    assert found.value == pytest.approx(whole.value - np.log(2), abs=0.15)
    assert found.missed_state == pytest.approx(0.5, abs=0.02)
    assert found.missed_rest < 0.01
    assert found.overlap_state < whole.overlap_state


def test_what_is_not_reliable_and_why():
    angle, draws, frames = given(np.random.default_rng(5))
    one_sided = two_sided_free_energy_difference(angle, np.arange(800), draws, angle[400:], frames[400:])
    assert np.isnan([one_sided.value, one_sided.std_error]).all()
    assert one_sided.interval is None
    assert "0.0 draws or independent frames in the state" in one_sided.message
    apart = two_sided_free_energy_difference(angle, np.arange(800), draws + 8, angle, frames - 8)
    assert "overlap by 0.00" in apart.message
    walkers = two_sided_free_energy_difference(angle, np.arange(800), draws, angle, frames, groups=np.arange(800) // 20)
    assert walkers.message.startswith("20.0 draws or independent frames in the state")
    assert not any(each.reliable for each in (one_sided, apart, walkers))
    for wrong in ({"groups": np.arange(3)}, {"frames_log_weights": np.zeros(3)}, {"state": (2.0, 1.0)}):
        with pytest.raises(UserError):
            two_sided_free_energy_difference(angle, np.arange(800), draws, angle, frames, **wrong)
    with pytest.raises(UserError, match="numbers"):
        two_sided_free_energy_difference(angle, np.arange(800), np.append(draws[1:], np.nan), angle, frames)


@pytest.mark.parametrize("frames", FRAMES)
def test_known_populations_of_four_states(frames):
    sizes = {"n_exact": 1000, "n_frames": 1000, "n_draws": 20_000}
    found = estimate_of_four(np.random.default_rng(0), frames, **sizes)
    assert found.labels.tolist() == [0, 1, 2, 3]
    assert found.populations.sum() == pytest.approx(1)
    for sides in ([0], [3]), ([1, 2], None), ([2], [0, 1]), ([3], None):
        row, state, rest = found.difference(*sides), list(sides[0]), sides[1]
        rest = rest or [s for s in range(4) if s not in state]
        known = np.log(KNOWN_OF_FOUR[rest].sum() / KNOWN_OF_FOUR[state].sum())
        assert row.reliable
        assert abs(row.value - known) < 3.5 * row.std_error < 0.5


def test_states_that_are_merged():
    """Two that are alike, told apart by a coin, are as one; and sets of states as the populations that they sum."""
    angle, draws, frames = given(np.random.default_rng(9), n=2000)
    coins = np.random.default_rng(10).random((2, 4000)) < 0.5
    weights = np.random.default_rng(11).normal(0.0, 0.3, 4000)
    names, theirs = (np.where(angle > 0, "in", np.where(coin, "out", "far")) for coin in coins)
    weighted = {"frames_log_weights": weights, "groups": np.arange(4000) // 4}
    one = two_sided_free_energy_difference(angle, np.arange(4000), draws, angle, frames, **weighted)
    found = two_sided_states(names, np.arange(4000), draws, theirs, frames, **weighted)
    two = found.difference(["in"])
    assert two.value == pytest.approx(one.value, abs=0.2 * one.std_error)
    assert two.std_error == pytest.approx(one.std_error, rel=0.1)
    assert (two.n_state, two.n_rest, two.seen_state) == (one.n_state, one.n_rest, pytest.approx(one.seen_state))
    assert two.seen_rest == pytest.approx(one.seen_rest, rel=0.1)
    assert two.overlap_rest == pytest.approx(one.overlap_rest, abs=0.05)
    p = dict(zip(found.labels, found.populations, strict=True))
    assert two.value == pytest.approx(np.log((p["out"] + p["far"]) / p["in"]))
    assert found.difference(["out", "far"], ["in"]).value == pytest.approx(-two.value)
    assert found.difference(["in"], ["out", "far"]) == two


def test_states_that_lack_draws_or_frames():
    """They are unknown, and the others' populations do without them."""
    rng = np.random.default_rng(12)
    x, y = rng.normal(0.0, 1.2, (2, 1200))
    states = np.repeat(["a", "b", "undrawn"], 400)
    drawn = np.where(states == "undrawn", "unvisited", states)
    found = two_sided_states(drawn, np.arange(1200), x, states, y)
    known = two_sided_states(drawn[:800], np.arange(800), x[:800], states[:800], y[:800])
    assert found.labels.tolist() == ["a", "b", "undrawn", "unvisited"]
    assert np.isnan(found.populations[2:]).all()
    assert found.populations[:2].sum() == pytest.approx(1)
    row = found.difference(["a"], ["b"])
    assert row.reliable
    assert row.value == pytest.approx(known.difference(["a"]).value - np.log(1))
    for lacking in ("undrawn", "unvisited", "nowhere"):
        none = found.difference([lacking])
        assert np.isnan([none.value, none.std_error]).all()
        assert none.message.startswith("0.0 draws or independent frames in the state")
    half = found.difference(["a"])  # against b and what nothing is drawn of
    assert half.value == pytest.approx(row.value)
    assert half.message == "states without draws hold 50.0% of the frames in the rest"
    assert not half.reliable
    few = two_sided_states(drawn, np.arange(1200), x, states, y, frames_log_weights=np.repeat([0.0, -6.0], [800, 400]))
    assert few.difference(["a"]).reliable
