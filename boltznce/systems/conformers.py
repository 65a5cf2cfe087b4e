"""Rough conformers of a molecule from its structure alone: what is known of its shape before any simulation."""

from collections.abc import Sequence

import networkx
import torch
from torch import Tensor

__all__ = ["random_conformers", "rotatable_bonds"]

JITTER_NM = 0.003  # of every coordinate: bond lengths then spread as at 300 K


def rotatable_bonds(bonds: Sequence[tuple[int, int]], n_atoms: int) -> list[tuple[int, int, list[int]]]:
    """Bonds (a, b) about which a molecule turns, each with the atoms on b's side but b itself, the smaller side.

    Those that are in no ring, with more atoms at both ends, but not between two atoms with three neighbours each, which
    are planar (peptide bonds, amides, guanidinium).
    """
    graph = networkx.Graph(list(bonds))
    graph.add_nodes_from(range(n_atoms))
    found = []
    for a, b in sorted(tuple(sorted(bond)) for bond in networkx.bridges(graph)):
        degrees = graph.degree[a], graph.degree[b]
        if min(degrees) == 1 or degrees == (3, 3):
            continue
        cut = networkx.restricted_view(graph, [], [(a, b)])
        sides = [networkx.node_connected_component(cut, end) for end in (a, b)]
        if len(sides[0]) < len(sides[1]):
            a, b, sides = b, a, sides[::-1]
        found.append((a, b, sorted(sides[1] - {b})))
    return found


def random_conformers(
    structure: Tensor, bonds: Sequence[tuple[int, int]], n: int, generator: torch.Generator | None = None
) -> Tensor:
    """``n`` copies of a structure (n_atoms, 3) in nm, turned about every rotatable bond by random angles, atoms
    jittered: (n, n_atoms, 3).

    Bond lengths, angles, planes and chirality are those of the structure; clashes are not avoided. Centred.
    """
    x = structure.double().expand(n, -1, -1).clone()
    for a, b, moved in rotatable_bonds(bonds, len(structure)):
        angle = 2 * torch.pi * torch.rand(n, 1, 1, generator=generator, dtype=x.dtype, device=x.device)
        origin = x[:, b : b + 1]
        axis = torch.nn.functional.normalize(origin - x[:, a : a + 1], dim=-1)
        arm = x[:, moved] - origin
        along = (arm * axis).sum(-1, keepdim=True) * axis
        across = torch.linalg.cross(axis.expand_as(arm), arm)
        x[:, moved] = origin + along + (arm - along) * angle.cos() + across * angle.sin()
    x = x + JITTER_NM * torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
    return (x - x.mean(dim=1, keepdim=True)).to(structure.dtype)
