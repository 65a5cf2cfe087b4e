"""Molecules made whole that a periodic box has cut."""

from collections.abc import Sequence

import numpy as np

__all__ = ["make_whole", "spanning_bonds"]


def spanning_bonds(bonds: Sequence[tuple[int, int]], n_atoms: int) -> list[tuple[int, int]]:
    """(placed, next) for every atom but the first, along bonds from there; a further molecule hangs on atom 0.

    >>> spanning_bonds([(1, 2), (0, 1), (3, 4)], 5)
    [(0, 1), (1, 2), (0, 3), (3, 4)]
    """
    bonded: list[list[int]] = [[] for _ in range(n_atoms)]
    for a, b in bonds:
        bonded[a].append(b)
        bonded[b].append(a)
    found, seen = [], {0}
    for root in range(n_atoms):
        if root not in seen:
            seen.add(root)
            found.append((0, root))
        frontier = [root]
        while frontier:
            here = frontier.pop()
            fresh = [other for other in bonded[here] if other not in seen]
            found += [(here, other) for other in fresh]
            seen |= set(fresh)
            frontier += fresh
    return found


def make_whole(x: np.ndarray, box: np.ndarray, steps: Sequence[tuple[int, int]]) -> np.ndarray:
    """Positions (n, n_atoms, 3) with every atom at the image nearest to that before it (`spanning_bonds`).

    ``box`` (n, 3, 3): the vectors of a cell, of any shape, in rows; the unit is that of the positions.
    """
    x, box = x.astype(np.float64), box.astype(np.float64)
    inverse = np.linalg.inv(box)
    for placed, moved in steps:
        turns = np.einsum("ni,nij->nj", x[:, moved] - x[:, placed], inverse).round()
        x[:, moved] -= np.einsum("ni,nij->nj", turns, box)
    return x
