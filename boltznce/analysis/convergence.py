"""How long a simulation remembers."""

import numpy as np

__all__ = ["time_blocks"]

_BLOCK = 6.0  # statistical inefficiencies in a block of time
_WINDOW = 5.0  # integrated autocorrelation times that are summed over (Sokal)


def time_blocks(inside: np.ndarray, walkers: np.ndarray | None = None) -> np.ndarray:
    """The number of its block of time for each frame (n,), blocks long enough to be independent.

    Args:
        inside: (n,) bool, whether each frame is in the state, those of each walker in order of time.
        walkers: (n,) the walker of each frame; one, if not given.

    A block has six statistical inefficiencies g = 1 + 2 Σ_t ρ(t) of ``inside``, ρ averaged over walkers and taken about
    the mean of all, the sum cut at the first lag beyond 5 g / 2 (Sokal 1997). A walker that is no longer than two of
    them is a block. Few blocks mean that the simulation was too short: `free_energy_difference` wants ten.

    >>> time_blocks(np.arange(18) % 2 == 0)  # frames that remember nothing
    array([0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2])
    """
    inside = np.asarray(inside, dtype=np.float64)
    walkers = np.zeros(len(inside)) if walkers is None else np.asarray(walkers)
    members = [np.flatnonzero(walkers == walker) for walker in np.unique(walkers)]
    longest, blocks, n_blocks = max(map(len, members)), np.zeros(len(inside), dtype=np.int64), 0
    spectrum = sum(np.abs(np.fft.rfft(inside[each] - inside.mean(), 2 * longest)) ** 2 for each in members)
    covariance = np.fft.irfft(spectrum)[:longest]
    if covariance[0] > 0:
        inefficiency = 2.0 * np.cumsum(covariance / covariance[0]) - 1.0
        enough = np.flatnonzero(np.arange(longest) >= _WINDOW / 2.0 * inefficiency)
        length = _BLOCK * max(1.0, inefficiency[enough[0]]) if len(enough) else longest
    else:
        length = longest
    for each in members:
        n = max(1, int(len(each) / length))
        blocks[each] = n_blocks + np.arange(len(each)) * n // len(each)
        n_blocks += n
    return blocks
