"""Topologies in text: a PDB file with every bond, and all that mdtraj knows, which a PDB file cannot hold, as JSON."""

import json
from collections.abc import Sequence

import mdtraj
import numpy as np
from mdtraj import Topology

__all__ = ["from_json", "pdb_text", "system_pdb", "to_json"]

LARGEST = 999.0  # nm: the columns of a PDB file hold no more
CHAIN_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"
CODES = " ABCDEFGHIJKLMNOPQRSTUVWXYZ"  # of insertion


def pdb_text(topology: Topology, positions: np.ndarray, residue_ids: Sequence[tuple[str, str]] | None = None) -> str:
    """A PDB file of one conformer (n_atoms, 3) in nm, its CONECT records every bond, those of rings and links too.

    Residues have their numbers, or ``residue_ids`` (number, insertion code). Where neighbours in a chain could not be
    told apart by these, the later ones get insertion codes, and where a number does not fit all are counted from 1.
    """
    positions = np.clip(np.nan_to_num(positions), -LARGEST, LARGEST)
    lines, ids = [], _residue_ids(topology, residue_ids)
    serials: dict[int, int] = {}
    for number, chain in enumerate(topology.chains):
        chain_id = (chain.chain_id or "").strip() or CHAIN_LETTERS[number % len(CHAIN_LETTERS)]
        for residue in chain.residues:
            where = f"{f'{residue.name[:4]:>3}':<4}{chain_id[0]}{ids[residue.index]}"
            for atom in residue.atoms:
                serials[atom.index] = serial = len(serials) + number + 1
                symbol = atom.element.symbol if atom.element is not None else ""
                name = f" {atom.name:<3}" if len(atom.name) < 4 and len(symbol) < 2 else f"{atom.name[:4]:<4}"
                x, y, z = (f"{10 * float(v):8.3f}"[:8] for v in positions[atom.index])
                lines.append(f"ATOM  {serial % 100000:>5} {name} {where}   {x}{y}{z}  1.00  0.00          {symbol:>2}")
        lines.append(f"TER   {(len(serials) + number + 1) % 100000:>5}      {where}")
    bonded: dict[int, list[int]] = {index: [] for index in serials}
    for a, b in topology.bonds:
        bonded[a.index].append(b.index)
        bonded[b.index].append(a.index)
    for index, others in bonded.items():
        for start in range(0, len(others), 4):
            row = [index, *sorted(others)[start : start + 4]]
            lines.append("CONECT" + "".join(f"{serials[i] % 100000:>5}" for i in row))
    return "\n".join([*lines, "END", ""])


def system_pdb(system) -> str:
    """A molecule's PDB file: its minimized structure, residues numbered as in the file that it comes from."""
    ids = [(residue.id, residue.insertionCode) for residue in system.openmm_topology().residues()]
    return pdb_text(system.topology, system.positions.numpy(), ids)


def to_json(topology: Topology) -> str:
    """Chains, residues, atoms and bonds, as `from_json` reads them."""
    chains = [
        {
            "id": chain.chain_id,
            "residues": [
                {
                    "name": residue.name,
                    "number": residue.resSeq,
                    "segment": residue.segment_id,
                    "atoms": [[atom.name, atom.element.symbol if atom.element else None] for atom in residue.atoms],
                }
                for residue in chain.residues
            ],
        }
        for chain in topology.chains
    ]
    return json.dumps({"chains": chains, "bonds": [[a.index, b.index] for a, b in topology.bonds]})


def from_json(text: str) -> Topology:
    """The topology that `to_json` wrote; raises ValueError, KeyError or TypeError for anything else."""
    contents, topology, atoms = json.loads(text), Topology(), []
    for chain in contents["chains"]:
        own = topology.add_chain(chain_id=chain["id"])
        for residue in chain["residues"]:
            here = topology.add_residue(residue["name"], own, residue["number"], residue["segment"])
            for name, symbol in residue["atoms"]:
                element = None if symbol is None else mdtraj.element.get_by_symbol(symbol)
                atoms.append(topology.add_atom(name, element, here))
    for a, b in contents["bonds"]:
        topology.add_bond(atoms[a], atoms[b])
    return topology


def _residue_ids(topology: Topology, given: Sequence[tuple[str, str]] | None) -> list[str]:
    """Columns 23 to 27, number and insertion code, of every residue: no two the same in a chain."""
    if given is None:
        given = [(str(residue.resSeq), "") for residue in topology.residues]
    ids = [f"{number.strip():>4}{code.strip() or ' '}" for number, code in given]
    counted = [f"{(k + 1) % 10000:>4} " for k in range(topology.n_residues)]
    if not all(len(each) == 5 and each[:4].strip().lstrip("-").isdigit() for each in ids):
        return counted
    for chain in topology.chains:
        seen: set[str] = set()
        for k in (residue.index for residue in chain.residues):
            free = (code for code in (ids[k][4], *CODES) if ids[k][:4] + code not in seen)
            if (code := next(free, None)) is None:
                return counted
            ids[k] = ids[k][:4] + code
            seen.add(ids[k])
    return ids
