"""How often the intervals of `two_sided_free_energy_difference` hold the truth, where they are called reliable."""

import numpy as np
import pytest
from two_sided import FRAMES, KNOWN, KNOWN_OF_FOUR, estimate, estimate_of_four


@pytest.mark.slow
@pytest.mark.parametrize("dim", [6, 20, 40])  # overlaps of 0.7, 0.4, 0.2
@pytest.mark.parametrize("frames", FRAMES)
def test_intervals_hold_the_truth(frames, dim):
    rng = np.random.default_rng(dim)
    found = [estimate(rng, frames, dim, n_frames=500 if frames == "walkers" else 150) for _ in range(1000)]
    reliable = [each for each in found if each.reliable]
    held = np.mean([each.interval[0] < KNOWN < each.interval[1] for each in reliable])
    spread = np.std([each.value for each in found])
    claimed = np.sqrt(np.mean([each.std_error**2 for each in found]))
    print(f"{frames}, {dim}: reliable {len(reliable) / 1000:.3f}, held {held:.3f}, {claimed:.3f} for {spread:.3f}")
    assert len(reliable) >= 800
    assert 0.92 <= held <= 0.98
    assert 0.8 < claimed / spread < 1.25


@pytest.mark.slow
def test_no_overlap_is_not_reliable():
    rng = np.random.default_rng(0)
    assert not any(estimate(rng, "independent", 60, std=1.7).reliable for _ in range(200))


def held_by_four(frames: str, n_repeats: int) -> np.ndarray:
    """Shares of the intervals of each of four populations, and of the first two against the others, with the truth."""
    rng, sets = np.random.default_rng(1), [[0], [1], [2], [3], [0, 1]]
    known = [np.log(1 / KNOWN_OF_FOUR[some].sum() - 1) for some in sets]
    found = [estimate_of_four(rng, frames, n_frames=500 if frames == "walkers" else 150) for _ in range(n_repeats)]
    rows = [[each.difference(some) for some in sets] for each in found]
    assert np.mean([[row.reliable for row in each] for each in rows]) > 0.8
    return np.mean(
        [[row.interval[0] < k < row.interval[1] for row, k in zip(each, known, strict=True)] for each in rows], 0
    )


@pytest.mark.parametrize("frames", ["independent", "walkers"])
def test_some_intervals_of_four_populations(frames):
    assert (held_by_four(frames, 60) > 0.85).all()


@pytest.mark.slow
@pytest.mark.parametrize("frames", FRAMES)
def test_intervals_of_four_populations(frames):
    held = held_by_four(frames, 600)
    print(frames, held.round(3))
    assert ((held >= 0.92) & (held <= 0.98)).all()
