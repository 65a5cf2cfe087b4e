"""The order in which any molecule's atoms are placed, each from three others: a z-matrix from the bond graph."""

from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from boltznce.errors import UserError

__all__ = ["Row", "ZMatrix", "build_zmatrix"]


@dataclass(frozen=True)
class Row:
    """One atom and what places it: the bond to ``a``, the angle with ``b`` and the dihedral with ``c``, IUPAC sign.

    Atoms on the same ``a`` share b and c. The first of them has a dihedral of its own; of the others the difference to
    that of ``sibling`` is the coordinate: the angle between two planes that share the bond a-b, which hardly changes
    when the first one turns.
    """

    atom: int
    a: int
    b: int
    c: int
    sibling: int | None = None


@dataclass(frozen=True)
class ZMatrix:
    """Three atoms bonded in a row that fix the frame, then a `Row` for every other atom, after the atoms it needs."""

    root: tuple[int, int, int]
    rows: tuple[Row, ...]

    @property
    def levels(self) -> list[list[int]]:
        """Numbers of the rows that are placed together: those that need only the root, those that need these, ..."""
        level = dict.fromkeys(self.root, 0)
        for row in self.rows:
            level[row.atom] = 1 + max(level[row.a], level[row.b], level[row.c])
        numbers = range(1, 1 + max(level.values()))
        return [[k for k, row in enumerate(self.rows) if level[row.atom] == n] for n in numbers]


def build_zmatrix(
    n_atoms: int,
    bonds: Sequence[tuple[int, int]],
    core: Collection[int] = (),
    stereocentres: Sequence[tuple[int, int, int, int]] = (),
) -> ZMatrix:
    """Backbone first: the longest of the shortest paths between atoms of ``core``, then everything else outward from
    it, rings broken.

    core: atoms that may form the backbone (a peptide's main chain, heavy atoms); all, if that gives no path of three
        atoms. The torsions along the backbone are proper ones and coordinates of their own.
    stereocentres: (centre, three neighbours). Where the centre is reached through one of the three, the torsion of the
        second of the other two is the difference to that of the first: one coordinate alone then has the sign of their
        triple product.

    Raises UserError for fewer than three atoms and for atoms that are not all connected.
    """
    neighbours: list[list[int]] = [[] for _ in range(n_atoms)]
    for a, b in bonds:
        neighbours[a].append(b)
        neighbours[b].append(a)
    neighbours = [sorted(atoms) for atoms in neighbours]
    backbone = longest_path(neighbours, core)
    if len(backbone) < 3:
        backbone = longest_path(neighbours, range(n_atoms))
    if len(backbone) < 3:
        raise UserError("Internal coordinates need three atoms bonded in a row: use a Cartesian generator.")
    order, parent = spanning_tree(neighbours, backbone)
    if len(order) < n_atoms:
        loose = sorted(set(range(n_atoms)) - set(order))
        raise UserError(
            f"Internal coordinates need one molecule, all of it bonded: atoms {loose[:10]} are not bonded to the rest. "
            "Check the structure's bonds (CONECT records), or give one molecule."
        )
    root = (backbone[0], backbone[1], backbone[2])
    parent[root[0]] = root[1]  # of which there is none above: the frame is taken from the other side
    handed = {centre: set(corners) for centre, *corners in stereocentres}
    first = {root[1]: root[2]}  # placed atom on each atom whose dihedral the others follow
    rows = []
    for a in dict.fromkeys(parent[atom] for atom in order if atom not in root):
        b = parent[a]
        c = parent[b] if parent[b] != a else root[2]
        children = [atom for atom in order if parent[atom] == a and atom not in root]
        leader = first.get(a, children[0])
        corners = [atom for atom in children if atom in handed.get(a, ()) and atom != leader]
        for atom in children:
            sibling = None if atom == leader else leader
            if len(corners) == 2 and b in handed[a] and atom == corners[1]:
                sibling = corners[0]
            rows.append(Row(atom, a, b, c, sibling))
    return ZMatrix(root, tuple(_sorted_by_need(rows, root)))


def longest_path(neighbours: Sequence[Sequence[int]], among: Collection[int]) -> list[int]:
    """The longest of the shortest paths within ``among``, from its end with the lower number to the other."""
    among = set(among)
    best: list[int] = []
    for start in sorted(among):
        came_from, last = {start: start}, start
        queue = deque([start])
        while queue:
            last = queue.popleft()
            for atom in neighbours[last]:
                if atom in among and atom not in came_from:
                    came_from[atom] = last
                    queue.append(atom)
        path = [last]
        while path[-1] != start:
            path.append(came_from[path[-1]])
        if len(path) > len(best):
            best = path[::-1]
    return best


def spanning_tree(neighbours: Sequence[Sequence[int]], backbone: Sequence[int]) -> tuple[list[int], dict[int, int]]:
    """Atoms as placed, and the atom each hangs on: backbone, then breadth first, chains before single atoms."""
    parent = dict(zip(backbone[1:], backbone, strict=False))
    order = list(backbone)
    queue = deque(backbone)
    placed = set(backbone)
    while queue:
        atom = queue.popleft()
        for child in sorted(set(neighbours[atom]) - placed, key=lambda k: (len(neighbours[k]) == 1, k)):
            parent[child] = atom
            placed.add(child)
            order.append(child)
            queue.append(child)
    return order, parent


def _sorted_by_need(rows: Sequence[Row], root: tuple[int, int, int]) -> list[Row]:
    """The rows, each after those of the atoms that it is placed from."""
    placed, ordered, waiting = set(root), [], list(rows)
    while waiting:
        ready = [row for row in waiting if {row.a, row.b, row.c} <= placed]
        ordered += ready
        placed |= {row.atom for row in ready}
        waiting = [row for row in waiting if row.atom not in placed]
    return ordered
