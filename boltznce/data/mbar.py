"""Free energies of biased ensembles by MBAR."""

import logging

import numpy as np

__all__ = ["MBAR_MAX_FRAMES", "free_energies"]

MBAR_MAX_FRAMES = 40_000  # enough to solve it on


def free_energies(bias: np.ndarray, counts: np.ndarray, guess: np.ndarray | None = None) -> np.ndarray:
    """Reduced free energies (K,) from the reduced bias (K, n) of every ensemble, counts (K,) of the n frames from each.

    Shirts and Chodera, J. Chem. Phys. 129, 124105 (2008). Frames are in the order of their ensembles.
    """
    logging.getLogger("pymbar").setLevel(logging.ERROR)  # or importing it prints advice on JAX
    from pymbar import MBAR

    return MBAR(bias, counts, initial_f_k=guess).f_k
