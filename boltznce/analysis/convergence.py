"""How long a simulation remembers, and how long it has to be for a free-energy difference of a given error."""

import numpy as np

from boltznce.errors import UserError

__all__ = ["error_constant", "frames_for_error", "time_blocks"]

_FEWEST_BLOCKS = 6
_BLOCK = 6.0  # statistical inefficiencies in a block of time
_WINDOW = 5.0  # integrated autocorrelation times that are summed over (Sokal)


def error_constant(inside: np.ndarray) -> float:
    """c, where n frames of this simulation give ΔF = -log(P(state) / P(rest)) to c / √n kT, correlation and all.

    Args:
        inside: (n_walkers, n_frames) bool, whether each frame is in the state, in order of time.

    Blocks of some lengths are compared with the whole: c is the median over the lengths L of √L times the root mean
    square deviation of the blocks of one walker. Half a frame is added to either side, so that a block that has seen
    one side alone counts as off by a finite amount. Raises UserError for fewer than two frames a walker or a simulation
    that has seen only one side.
    """
    inside = np.atleast_2d(np.asarray(inside, dtype=bool))
    n_walkers, n_frames = inside.shape
    if n_frames < 2 or inside.all() or not inside.any():
        raise UserError("The simulation has seen one side of the free-energy difference only: make it longer.")
    whole = _difference(inside.sum(), inside.size)
    constants = []
    length = n_frames
    while length >= max(8, n_frames // 32) or not constants:
        n_blocks = n_frames // length
        if n_walkers * n_blocks >= _FEWEST_BLOCKS or length <= 8:
            blocks = inside[:, : n_blocks * length].reshape(n_walkers, n_blocks, length).sum(-1)
            constants.append(np.sqrt(length * np.mean((_difference(blocks, length) - whole) ** 2)))
        if length <= 8:
            break
        length //= 2
    return float(np.median(constants))


def frames_for_error(inside: np.ndarray, error: float) -> float:
    """Frames of one walker that bring the error of ΔF down to ``error`` kT: (c / error)², see `error_constant`."""
    return (error_constant(inside) / error) ** 2


def _difference(n_inside: np.ndarray, n: int) -> np.ndarray:
    return np.log((n - n_inside + 0.5) / (n_inside + 0.5))


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
