"""A molecule: structure + force field -> energy, topology, named dihedrals, atom features, chirality."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import mdtraj
import numpy as np
import openmm
import torch
from openmm import app, unit
from torch import Tensor

from boltznce.errors import UserError
from boltznce.states import State
from boltznce.systems.base import System, check_name
from boltznce.systems.encodings import encode_atoms
from boltznce.systems.external import ExternalEnergy
from boltznce.systems.force_field_files import shipped_file
from boltznce.systems.forcefield import TorchForceField
from boltznce.systems.openmm_energy import OpenMMEnergy
from boltznce.systems.peptides import build_peptide, looks_like_sequence
from boltznce.systems.semiempirical import XTBEnergy
from boltznce.units import GAS_CONSTANT

__all__ = ["MolecularSystem"]

STRUCTURES = Path(__file__).parent / "structures"
BACKENDS = ("torch", "openmm", "xtb")
MOST_BYTES = 2**26  # of a structure
XTB = ["GFN2-xTB", "ALPB water"]

Four = tuple[int, int, int, int]
Array = TypeVar("Array", Tensor, np.ndarray)


class MolecularSystem(System):
    """A molecule without constraints in the canonical ensemble.

    Args:
        name: what to call it; also names its reference file.
        structure: a PDB file with all hydrogens, the name of one in ``systems/structures``, or a peptide's sequence
            (``AK``, ``ACE-AAA-NME``; see `build_peptide`).
        forcefield: OpenMM force-field files, as for ``openmm.app.ForceField``.
        temperature: K.
        nonbonded_method: name of an OpenMM nonbonded method (``NoCutoff``, ``CutoffNonPeriodic``).
        cutoff_nm: cutoff in nm for the methods that have one.
        dihedrals: more dihedrals, name -> four atom numbers, beside the backbone's.
        state: dihedral and interval (radians) of the state whose free energy is asked for.
        encoding: of ``features``: None (``atom_classes``, for one molecule), or one of `encodings` for many peptides.
        n_places: residues that the encoding ``full`` has room for.
        energy_backend: ``torch`` (batched, on any device), ``openmm`` (Reference platform, one conformer at a time), or
            ``xtb`` (GFN2-xTB in ALPB water; bonds, total charge and ``positions`` are then the force field's).
        n_workers: processes for ``openmm`` and ``xtb``; default one a core.
        compile: the ``torch`` energy and simulations with it, by torch.compile; ``auto``: where there is a GPU.

    Attributes:
        forcefield: what the energy comes from: the names of the force field's files, or of the semiempirical method.
        dihedrals: ``phi``, ``phi2``, ..., ``psi``, ``psi2``, ... from the N-terminus; ``omega1``, ``omega2``, ...

    Raises UserError for a structure or a force field that cannot be read, for residues that the force field does not
    know, and for ``xtb`` where tblite is not installed.
    """

    dim = 3
    translation_invariant = True

    def __init__(
        self,
        name: str,
        structure: str | Path,
        forcefield: Sequence[str],
        temperature: float,
        nonbonded_method: str = "NoCutoff",
        cutoff_nm: float | None = None,
        dihedrals: Mapping[str, Sequence[int]] | None = None,
        state: tuple[str, tuple[float, float]] | None = None,
        encoding: str | None = None,
        n_places: int = 2,
        energy_backend: str = "torch",
        n_workers: int | None = None,
        compile: str | bool = "auto",
    ):
        check_name(name)
        if not temperature > 0:
            raise UserError(f"A temperature must be positive, not {temperature}.")
        if energy_backend not in BACKENDS:
            raise UserError(f"Unknown energy_backend {energy_backend!r}: choose one of {', '.join(BACKENDS)}.")
        self.name, self.temperature = name, float(temperature)
        self.energy_backend, self.compile = energy_backend, compile
        self.forcefield = list(XTB) if energy_backend == "xtb" else list(forcefield)
        self._openmm_topology, self._structure_nm = read_structure(structure)
        self._openmm_system = build_openmm_system(self._openmm_topology, list(forcefield), nonbonded_method, cutoff_nm)
        self._potential = make_potential(energy_backend, self._openmm_system, self._openmm_topology, n_workers, compile)

        self.topology = mdtraj.Topology.from_openmm(self._openmm_topology)
        self.n_atoms = self.topology.n_atoms
        self.bonds = [(a.index, b.index) for a, b in self.topology.bonds]
        more = {key: tuple(atoms) for key, atoms in (dihedrals or {}).items()}
        self.dihedrals = backbone_dihedrals(self.topology) | more
        self.omegas = [key for key in self.dihedrals if key.startswith("omega")]
        self.methyl_groups = [group for group in attached_hydrogens(self.topology).values() if len(group) == 3]
        if encoding is None:
            self.features = torch.nn.functional.one_hot(torch.tensor(atom_classes(self.topology))).float()
        else:
            self.features = encode_atoms(self.topology, encoding, n_places)
        self.stereocentres = find_stereocentres(self.topology)
        if state is not None:
            self.state = State.of(state)
            self._atoms(self.state.coordinate)

    def __repr__(self) -> str:
        energy = " + ".join(self.forcefield)
        return f"{type(self).__name__}({self.name}, {self.n_atoms} atoms, {self.temperature:g} K, {energy})"

    @cached_property
    def positions(self) -> Tensor:
        """The structure at the nearest minimum of the force field, (n_atoms, 3) in nm, float32."""
        integrator = openmm.VerletIntegrator(0.001)
        context = openmm.Context(self._openmm_system, integrator, openmm.Platform.getPlatformByName("Reference"))
        context.setPositions(self._structure_nm)
        openmm.LocalEnergyMinimizer.minimize(context)
        minimized = context.getState(positions=True).getPositions(asNumpy=True).value_in_unit(unit.nanometer)
        return torch.from_numpy(minimized - minimized.mean(0)).float()

    def energy(self, x: Tensor) -> Tensor:
        """Reduced energy U(x) / kT of positions (batch, n_atoms, 3) in nm; (batch,), in the dtype of x."""
        if x.dim() != 3 or x.shape[1:] != (self.n_atoms, 3):
            raise UserError(f"{self.name} has positions (batch, {self.n_atoms}, 3), not {tuple(x.shape)}.")
        return self._potential(x) / (GAS_CONSTANT * self.temperature)

    def dihedral(self, x: Array, name: str) -> Array:
        """A named dihedral of positions (batch, n_atoms, 3), (batch,) in (-π, π], IUPAC sign; tensor or array."""
        atoms = list(self._atoms(name))
        # indexed first: a copy, as a dataset's arrays are read-only
        angle = dihedral_angle(torch.as_tensor(x[..., atoms, :]))
        return angle if isinstance(x, Tensor) else angle.numpy()

    def coordinate(self, x: Array, name: str) -> Array:
        """A named dihedral (see `dihedral`): what tells the states of a molecule apart."""
        return self.dihedral(x, name)

    @property
    def identity(self) -> dict[str, Any]:
        return {"name": self.name, "force_field": self.forcefield}

    def chirality(self, x: Array) -> Array:
        """Per stereocentre +1 for the handedness of the structure and -1 for its mirror image, (batch, n_centres)."""
        centres = torch.tensor(self.stereocentres, dtype=torch.long).view(-1, 4)
        reference = handedness(torch.from_numpy(self._structure_nm), centres)
        given = torch.as_tensor(x)
        signs = handedness(given, centres) * reference.to(given)
        return signs if isinstance(x, Tensor) else signs.numpy()

    def openmm_system(self) -> openmm.System:
        """A fresh copy of the force field's OpenMM System, without constraints, to change at will."""
        return openmm.XmlSerializer.clone(self._openmm_system)

    def openmm_topology(self) -> app.Topology:
        return self._openmm_topology

    def _atoms(self, name: str) -> Four:
        if name not in self.dihedrals:
            raise UserError(f"{self.name} has no dihedral {name!r}: choose one of {', '.join(self.dihedrals)}.")
        return self.dihedrals[name]


def read_structure(structure: str | Path) -> tuple[app.Topology, np.ndarray]:
    """Topology, and positions (n_atoms, 3) in nm, of a shipped structure, a PDB file or a peptide's sequence."""
    shipped = STRUCTURES / f"{structure}.pdb"
    path = shipped if shipped.is_file() else Path(structure).expanduser()
    if not path.is_file():
        if looks_like_sequence(str(structure)):
            return build_peptide(str(structure))
        names = ", ".join(sorted(p.stem for p in STRUCTURES.glob("*.pdb")))
        raise UserError(
            f"There is no structure file {path}: give the path of a PDB file, one of the shipped structures ({names}), "
            "or the sequence of a peptide, as AK or ACE-AAA-NME."
        )
    if path.stat().st_size > MOST_BYTES:
        raise UserError(f"{path} is too large to be a molecule's PDB file: give another structure.")
    try:
        pdb = app.PDBFile(str(path))
        return pdb.topology, pdb.getPositions(asNumpy=True).value_in_unit(unit.nanometer)
    except Exception as error:  # OpenMM's reader fails in as many ways as a file can be wrong
        raise UserError(f"{path} cannot be read as a PDB file ({error}): export it again.") from error


def build_openmm_system(
    topology: app.Topology, files: Sequence[str], nonbonded_method: str, cutoff_nm: float | None
) -> openmm.System:
    """An OpenMM System with every degree of freedom: no constraints, no removal of the centre-of-mass motion."""
    method = getattr(app, nonbonded_method, None)
    if nonbonded_method not in ("NoCutoff", "CutoffNonPeriodic"):
        raise UserError(f"Unknown nonbonded_method {nonbonded_method!r}: choose NoCutoff or CutoffNonPeriodic.")
    if (cutoff_nm is None) != (nonbonded_method == "NoCutoff"):
        raise UserError("nonbonded_method=CutoffNonPeriodic needs cutoff_nm, and NoCutoff takes none.")
    cutoff = {} if cutoff_nm is None else {"nonbondedCutoff": cutoff_nm * unit.nanometer}
    try:
        forcefield = app.ForceField(*(str(shipped_file(file) or file) for file in files))
    except Exception as error:
        raise UserError(f"The force field {', '.join(files)} cannot be loaded ({error}).") from error
    untyped = forcefield.getUnmatchedResidues(topology)
    if untyped:
        residues = ", ".join(f"{residue.name} {residue.id} (chain {residue.chain.id})" for residue in untyped)
        raise UserError(
            f"The force field {', '.join(files)} has no template for residue {residues}: "
            "check that its atoms, hydrogens and caps are complete and named as in the force field, or use another."
        )
    try:
        return forcefield.createSystem(
            topology, nonbondedMethod=method, constraints=None, rigidWater=False, removeCMMotion=False, **cutoff
        )
    except Exception as error:
        raise UserError(f"The force field {', '.join(files)} does not fit the structure: {error}") from error


def make_potential(
    backend: str, system: openmm.System, topology: app.Topology, n_workers: int | None, compile: str | bool
) -> TorchForceField | ExternalEnergy:
    """What computes energies in kJ/mol: positions (batch, n_atoms, 3) in nm -> (batch,)."""
    if backend == "torch":
        return TorchForceField(system, compile)
    if backend == "openmm":
        return OpenMMEnergy(system, n_workers)
    return XTBEnergy([atom.element.atomic_number for atom in topology.atoms()], total_charge(system), n_workers)


def total_charge(system: openmm.System) -> int:
    """Sum of a force field's charges, in e."""
    forces = [force for force in system.getForces() if isinstance(force, openmm.NonbondedForce)]
    charges = [
        force.getParticleParameters(i)[0].value_in_unit(unit.elementary_charge)
        for force in forces
        for i in range(system.getNumParticles())
    ]
    return round(sum(charges))


def neighbours(topology: mdtraj.Topology) -> list[list[mdtraj.core.topology.Atom]]:
    """Bonded atoms of every atom, in the order of their indices."""
    bonded = [[] for _ in topology.atoms]
    for a, b in topology.bonds:
        bonded[a.index].append(b)
        bonded[b.index].append(a)
    return [sorted(atoms, key=lambda atom: atom.index) for atoms in bonded]


def backbone_dihedrals(topology: mdtraj.Topology) -> dict[str, Four]:
    """phi, psi and omega of every peptide bond, caps included, by name in the order of the chain."""
    bonded = neighbours(topology)

    def neighbour(atom, name):
        return next(
            (other for other in bonded[atom.index] if other.name == name and other.residue == atom.residue), None
        )

    def alpha(atom):
        """The Cα of a residue, or the methyl carbon of a cap."""
        carbons = [
            other for other in bonded[atom.index] if other.element.symbol == "C" and other.residue == atom.residue
        ]
        return neighbour(atom, "CA") or next(iter(carbons), None)

    found = {"phi": [], "psi": [], "omega": []}
    amides = [
        (c, n)
        for c in topology.atoms
        if c.name == "C"
        for n in bonded[c.index]
        if n.name == "N" and n.residue != c.residue
    ]
    for carbon, nitrogen in amides:
        before, after = alpha(carbon), alpha(nitrogen)
        if before is None or after is None:
            continue
        found["omega"].append((before, carbon, nitrogen, after))
        if (start := neighbour(before, "N")) is not None:
            found["psi"].append((start, before, carbon, nitrogen))
        if (end := neighbour(after, "C")) is not None:
            found["phi"].append((carbon, nitrogen, after, end))
    return {
        f"{kind}{number}" if kind == "omega" or number > 1 else kind: tuple(atom.index for atom in atoms)
        for kind, quadruples in found.items()
        for number, atoms in enumerate(quadruples, start=1)
    }


def attached_hydrogens(topology: mdtraj.Topology) -> dict[int, tuple[int, ...]]:
    """Heavy atom -> its hydrogens."""
    bonded = neighbours(topology)
    return {
        atom.index: tuple(other.index for other in bonded[atom.index] if other.element.symbol == "H")
        for atom in topology.atoms
        if atom.element.symbol != "H"
    }


def atom_classes(topology: mdtraj.Topology) -> list[int]:
    """Class of each atom: its place when hydrogens follow their heavy atoms; three of a methyl share the middle one's.

    The BoltzNCE authors' numbering, in which some classes have no atom: 21 classes for alanine dipeptide.
    """
    classes = [0] * topology.n_atoms
    place = 0
    for heavy, hydrogens in attached_hydrogens(topology).items():
        classes[heavy] = place
        for number, hydrogen in enumerate(hydrogens, start=1):
            classes[hydrogen] = place + (2 if len(hydrogens) == 3 else number)
        place += 1 + len(hydrogens)
    return classes


def find_stereocentres(topology: mdtraj.Topology) -> list[Four]:
    """Carbons with four different neighbours, each with its first three: Cα, and Cβ of Ile and Thr.

    Neighbours differ if refining atom colours (element, then the colours around) over the bond graph tells them apart.
    """
    bonded = neighbours(topology)
    colours = [atom.element.atomic_number for atom in topology.atoms]
    for _ in colours:
        keys = [(colours[i], tuple(sorted(colours[other.index] for other in bonded[i]))) for i in range(len(colours))]
        numbers = {key: number for number, key in enumerate(sorted(set(keys)))}
        colours = [numbers[key] for key in keys]
    return [
        (atom.index, *(other.index for other in bonded[atom.index][:3]))
        for atom in topology.atoms
        if atom.element.symbol == "C" and len({colours[other.index] for other in bonded[atom.index]}) == 4
    ]


def dihedral_angle(points: Tensor) -> Tensor:
    """Dihedral of four points (..., 4, dim=3), (...,) in (-π, π], IUPAC sign."""
    b1, b2, b3 = points.diff(dim=-2).unbind(-2)
    m, n = torch.linalg.cross(b1, b2), torch.linalg.cross(b2, b3)
    return torch.atan2((b1 * n).sum(-1) * b2.norm(dim=-1), (m * n).sum(-1))


def handedness(x: Tensor, centres: Tensor) -> Tensor:
    """Sign (±1) of the triple product of each centre's bonds: (..., n_atoms, 3), (n_centres, 4) -> (..., n_centres)."""
    corners = x[..., centres[:, 1:], :] - x[..., centres[:, :1], :]
    volume = torch.linalg.det(corners)
    return torch.where(volume > 0, 1.0, -1.0).to(x)
