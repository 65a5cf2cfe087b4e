"""How often the intervals of `two_sided_free_energy_difference` hold the truth, where they are called reliable."""

import numpy as np
import pytest
from two_sided import FRAMES, KNOWN, estimate


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
