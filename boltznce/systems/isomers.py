"""Isomers of a molecule that no simulation at 300 K turns it into: found, and left out of figures on both sides."""

from collections.abc import Mapping

import numpy as np
import torch

from boltznce.errors import UserError
from boltznce.systems.base import System

__all__ = ["TURNED", "allowed_conformers", "excluded_conformers", "own_isomers", "require_some_left"]

TURNED = "peptide bond turned"


def excluded_conformers(system: System, positions: np.ndarray) -> dict[str, np.ndarray]:
    """Masks (n,) of other isomers than the structure is, which no simulation at 300 K turns into it, by why.

    Figures are conditional on the structure's own cis and trans peptide bonds and stereocentres.
    """
    x, masks = torch.from_numpy(np.array(positions)), {}
    if system.omegas:
        masks[TURNED] = (system.isomers(x) < 0).any(dim=1).numpy()
    if system.stereocentres:
        masks["inverted stereocentre"] = (system.chirality(x) < 0).any(dim=1).numpy()
    return masks


def allowed_conformers(excluded: Mapping[str, np.ndarray], n: int) -> np.ndarray:
    """Mask (n,) of what no mask of `excluded_conformers` holds."""
    return ~np.any([np.zeros(n, dtype=bool), *excluded.values()], axis=0)


def own_isomers(system: System, positions: np.ndarray) -> np.ndarray:
    """Mask (n,) of the positions that are the isomer that the system's structure is."""
    return allowed_conformers(excluded_conformers(system, positions), len(positions))


def require_some_left(
    system: System,
    excluded: Mapping[str, np.ndarray],
    n: int,
    what: str,
    remedy: str,
    weights: np.ndarray | None = None,
) -> float:
    """The share by ``weights`` (n,) that no mask excludes; UserError, with its ``remedy``, where nothing is left."""
    kept = allowed_conformers(excluded, n)
    share = float(np.average(kept, weights=weights))
    if not share > 0:
        reasons = " or ".join(why for why, mask in excluded.items() if mask.any())
        raise UserError(
            f"All {n} {what} of {system.name} are other isomers than its structure ({reasons}), so that nothing is "
            f"left to report on: {remedy}."
        )
    return share
