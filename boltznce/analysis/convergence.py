"""How long a simulation has to be for a free-energy difference of a given error."""

import numpy as np

from boltznce.errors import UserError

__all__ = ["error_constant", "frames_for_error"]

_FEWEST_BLOCKS = 6


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
