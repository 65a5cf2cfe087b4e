"""Whether conformers are the molecule: bonds read off distances make the graph of the topology, elements respected.

Two atoms are bonded if they are closer than 1.25 times the sum of their covalent radii (Cordero et al., Dalton Trans.
2008, 2832). Over 100 frames of 310 K MD of each of KS CM WY DE RH PF NQ IV TL GA, bonds stay below 1.12 times this sum
and all other pairs above 1.38 times it; two iodines on one carbon, at 1.26 times, would be taken for bonded. Atoms
closer than 0.6 times the sum are fused, which no molecule has.

Handedness is another question: `MolecularSystem.chirality` on the reordered conformers, mended by
`symmetry.mend_chirality`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import networkx
import numpy as np
import torch
from torch import Tensor

from boltznce.errors import UserError

__all__ = ["BondGraph", "GraphCheck"]

RADII_NM = {"H": 0.031, "C": 0.076, "N": 0.071, "O": 0.066, "S": 0.105}
RADII_NM |= {"B": 0.084, "F": 0.057, "Si": 0.111, "P": 0.107, "Cl": 0.102, "Se": 0.120, "Br": 0.120, "I": 0.139}
REACH, FUSED = 1.25, 0.6
# of refinement: bonds that a colour looks around; the same for every graph, so that colours can be compared
N_ROUNDS = 16


@dataclass(frozen=True)
class GraphCheck:
    """Which conformers are right, and how their atoms are put in the topology's order."""

    right: Tensor  # (batch,) bool
    order: Tensor  # (batch, n) int64: atom order[b, i] of conformer b is the topology's atom i; identity where wrong
    # equivalent atoms may end exchanged; Amber's impropers can tell, by up to 0.3 kT for the oxygens of a COO-
    reordered: Tensor  # (batch,) bool: right, but only after reordering

    def apply(self, x: Tensor) -> Tensor:
        """Conformers (batch, n, 3) in the topology's order; those that are not right stay as they are."""
        return x.gather(1, self.order.to(x.device).unsqueeze(-1).expand_as(x))


class BondGraph:
    """Bonds and elements of a molecule, to hold conformers against.

    Args:
        elements: symbols, (n,).
        bonds: pairs of atoms.
    """

    def __init__(self, elements: Sequence[str], bonds: Sequence[tuple[int, int]]):
        if unknown := sorted(set(elements) - set(RADII_NM)):
            raise UserError(f"There is no radius for {', '.join(unknown)} here: only for {', '.join(RADII_NM)}.")
        n, (first, second) = len(elements), torch.tensor(bonds, dtype=torch.long).view(-1, 2).T
        radii = torch.tensor([RADII_NM[symbol] for symbol in elements], dtype=torch.float64)
        self.thresholds = REACH * (radii.unsqueeze(0) + radii.unsqueeze(1))  # nm
        self.thresholds.fill_diagonal_(0)
        self.adjacency = torch.zeros(n, n, dtype=torch.bool)
        self.adjacency[first, second] = self.adjacency[second, first] = True
        self._elements = np.array([list(RADII_NM).index(symbol) for symbol in elements], dtype=np.uint64)
        self._colours = refine_colours(self.adjacency[None].numpy(), self._elements)[0]

    @classmethod
    def of(cls, topology) -> "BondGraph":
        """From an mdtraj.Topology."""
        return cls([atom.element.symbol for atom in topology.atoms], [(a.index, b.index) for a, b in topology.bonds])

    def contacts(self, x: Tensor) -> Tensor:
        """Which atoms of conformers (batch, n, 3) in nm are as close as bonded ones: (batch, n, n) bool."""
        return self._distances(x) < self.thresholds.to(x)

    def _distances(self, x: Tensor) -> Tensor:
        return torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")

    def check(self, x: Tensor, batch_size: int = 1024) -> GraphCheck:
        """Conformers (batch, n, 3) in nm against the topology.

        Nearly all that are right have the bonds in the given order, which needs distances alone. The rest is compared
        by refined colours, which are equal for isomorphic graphs and rarely else, and only where these are equal by
        graph matching.
        """
        right = torch.zeros(len(x), dtype=torch.bool)
        order = torch.arange(x.shape[1]).repeat(len(x), 1)
        reordered = torch.zeros(len(x), dtype=torch.bool)
        for start in range(0, len(x), batch_size):
            distances = self._distances(x[start : start + batch_size])
            contacts = (distances < self.thresholds.to(x)).cpu()
            whole = (distances >= FUSED / REACH * self.thresholds.to(x)).all(dim=(-2, -1)).cpu()
            agrees = whole & (contacts == self.adjacency).all(dim=(-2, -1))
            right[start : start + len(contacts)] = agrees
            # equal numbers of bonds first: it costs nothing, and sorts out most of what is broken
            candidates = torch.nonzero(whole & ~agrees & (contacts.sum(dim=(-2, -1)) == self.adjacency.sum())).flatten()
            colours = refine_colours(contacts[candidates].numpy(), self._elements)
            for i, row in zip(candidates.tolist(), colours, strict=True):
                if (found := self._match(contacts[i].numpy(), row)) is not None:
                    right[start + i] = reordered[start + i] = True
                    order[start + i] = torch.from_numpy(found)
        return GraphCheck(right, order, reordered)

    def _match(self, adjacency: np.ndarray, colours: np.ndarray) -> np.ndarray | None:
        """Atom of the conformer for each of the topology, (n,), or None where the graphs are unlike."""
        if not np.array_equal(np.sort(colours), np.sort(self._colours)):
            return None
        same = networkx.algorithms.isomorphism.categorical_node_match("colour", None)
        ours, theirs = _graph(self.adjacency.numpy(), self._colours), _graph(adjacency, colours)
        matcher = networkx.algorithms.isomorphism.GraphMatcher(ours, theirs, node_match=same)
        if not matcher.is_isomorphic():
            return None
        return np.array([matcher.mapping[i] for i in range(len(colours))])


def refine_colours(adjacency: np.ndarray, elements: np.ndarray) -> np.ndarray:
    """Hashes of atoms' elements and surroundings (Weisfeiler & Leman): (batch, n, n) bool, (n,) -> (batch, n) uint64.

    Atoms that an isomorphism maps onto each other have equal colours, in any graph and in any order of the atoms.
    """
    colours = np.broadcast_to(_scramble(elements), adjacency.shape[:2])
    edges = adjacency.astype(np.uint64)
    for _ in range(N_ROUNDS):
        colours = _scramble(np.uint64(3) * colours + np.einsum("bij,bj->bi", edges, _scramble(colours)))
    return colours


def _scramble(values: np.ndarray) -> np.ndarray:
    """splitmix64, modulo 2^64."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _graph(adjacency: np.ndarray, colours: np.ndarray) -> networkx.Graph:
    graph = networkx.from_numpy_array(adjacency.astype(int))
    networkx.set_node_attributes(graph, dict(enumerate(colours.tolist())), "colour")
    return graph
