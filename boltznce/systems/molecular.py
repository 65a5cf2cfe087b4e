"""A molecule: structure + force field -> energy, topology, named dihedrals, atom features, chirality."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self, TypeVar

import mdtraj
import numpy as np
import openmm
import torch
from openmm import app, unit
from torch import Tensor

from boltznce.errors import UserError
from boltznce.precision import ordinary_tensors
from boltznce.settings import require
from boltznce.systems.base import System, check_name
from boltznce.systems.coordinates import Coordinate, as_tensor, geometric
from boltznce.systems.dihedral import dihedral_angle
from boltznce.systems.encodings import encode_atoms
from boltznce.systems.external import ExternalEnergy
from boltznce.systems.forcefield import TorchForceField
from boltznce.systems.identity import molecule_identity, openmm_digest
from boltznce.systems.molecule_files import save_molecule
from boltznce.systems.openmm_checks import nonbonded_of, total_charge
from boltznce.systems.openmm_energy import OpenMMEnergy
from boltznce.systems.openmm_systems import build_openmm_system
from boltznce.systems.semiempirical import XTBEnergy
from boltznce.systems.structures import Structure, check_structure, read_structure
from boltznce.systems.torsions import backbone_dihedrals, neighbours, residue_dihedrals, turning_dihedrals
from boltznce.units import GAS_CONSTANT

__all__ = ["MolecularSystem"]

XTB = ["GFN2-xTB", "ALPB water"]

Four = tuple[int, int, int, int]
Array = TypeVar("Array", Tensor, np.ndarray)


class MolecularSystem(System):
    """A molecule without constraints in the canonical ensemble.

    Args:
        name: what to call it; also names its reference file.
        structure: a PDB file with all hydrogens, the name of one in ``systems/structures``, a peptide's sequence
            (``AK``, ``ACE-AAA-NME``; see `boltznce.systems.peptides.build_peptide`), or another file, or topology and
            positions: see `boltznce.systems.structures.read_structure`.
        forcefield: OpenMM force-field files, as for ``openmm.app.ForceField``; or a System, serialized or itself, or
            files of Amber, CHARMM or GROMACS: see `boltznce.systems.openmm_systems.build_openmm_system`.
        temperature: K.
        nonbonded_method: name of an OpenMM nonbonded method (``NoCutoff``, ``CutoffNonPeriodic``).
        cutoff_nm: cutoff in nm for the methods that have one.
        implicit_solvent: HCT, OBC1, OBC2, GBn or GBn2, for what has none of its own, as files of Amber, CHARMM and
            GROMACS; None adds none, and leaves these in a vacuum.
        dihedrals: more dihedrals, name -> four atom numbers, beside the backbone's.
        state: the state whose free energy is asked for: a coordinate and its interval, or several (see
            `System.state_of`).
        encoding: of ``features``: None (``atom_classes``, for one molecule), or one of `encodings` for many peptides.
        n_places: residues that the encodings ``backbone`` and ``full`` have room for.
        energy_backend: ``torch`` (batched, on any device), ``openmm`` (Reference platform, one conformer at a time), or
            ``xtb`` (GFN2-xTB in ALPB water; bonds, total charge and ``positions`` are then the force field's, and its
            ``torch`` energy is the ``proxy``).
        n_workers: processes for ``openmm`` and ``xtb``; default one a core.
        compile: the ``torch`` energy and simulations with it, by torch.compile; ``auto``: where there is a GPU.

    Attributes:
        forcefield: what the energy comes from: the names of the force field's files, or of the semiempirical method.
        dihedrals: ``phi``, ``phi2``, ..., ``psi``, ``psi2``, ... from the N-terminus; ``omega1``, ``omega2``, ...; of a
            molecule that has neither φ nor ψ nor ``dihedrals`` of yours ``tors1``, ``tors2``, ... about its bonds.

    Raises UserError for a structure or a force field that cannot be read, for residues that the force field does not
    know, for what is no molecule in the canonical ensemble (virtual sites, barostats, ...), and for ``xtb`` where
    tblite is not installed.
    """

    dim = 3
    translation_invariant = True
    topology: mdtraj.Topology
    features: Tensor

    def __init__(
        self,
        name: str,
        structure: Structure,
        forcefield: Sequence[str] | openmm.System,
        temperature: float,
        nonbonded_method: str = "NoCutoff",
        cutoff_nm: float | None = None,
        implicit_solvent: str | None = None,
        dihedrals: Mapping[str, Sequence[int]] | None = None,
        state: Any = None,
        encoding: str | None = None,
        n_places: int = 2,
        energy_backend: str = "torch",
        n_workers: int | None = None,
        compile: str | bool = "auto",
    ):
        self._settings = settings = {key: value for key, value in locals().items() if key != "self"}
        check_name(name)
        require("system", name=name, temperature=temperature, nonbonded_method=nonbonded_method, cutoff_nm=cutoff_nm)
        require(encoding=encoding, n_places=n_places, energy_backend=energy_backend, n_workers=n_workers)
        require(compile=compile, implicit_solvent=implicit_solvent)
        self.name, self.temperature = name, float(temperature)
        self.energy_backend, self.compile = energy_backend, compile
        if energy_backend == "xtb":
            self.proxy = type(self)(**settings | {"energy_backend": "torch"})
        files = ["openmm.System"] if isinstance(forcefield, openmm.System) else list(forcefield)
        files += [implicit_solvent] if implicit_solvent else []
        self.forcefield = list(XTB) if energy_backend == "xtb" else files
        self._files = [Path(name).name if Path(name).is_file() else name for name in self.forcefield]
        self._nonbonded: dict[str, Any] = {"nonbonded": nonbonded_method, "cutoff_nm": cutoff_nm and float(cutoff_nm)}
        given, self._structure_nm = read_structure(structure)
        self._openmm_system, self._openmm_topology = build_openmm_system(
            forcefield, given, nonbonded_method, self._nonbonded["cutoff_nm"], implicit_solvent
        )
        if given is not self._openmm_topology:
            check_structure(self._openmm_topology, self._structure_nm, "The structure")
        self._potential = make_potential(energy_backend, self._openmm_system, self._openmm_topology, n_workers, compile)

        self.topology = mdtraj.Topology.from_openmm(self._openmm_topology)
        self.n_atoms = self.topology.n_atoms
        self.bonds = [(a.index, b.index) for a, b in self.topology.bonds]
        more: dict[str, Any] = {key: tuple(atoms) for key, atoms in (dihedrals or {}).items()}
        backbone = backbone_dihedrals(self.topology)
        self.omegas = [key for key in backbone if key.startswith("omega")]
        if len(backbone) == len(self.omegas) and not more:
            more = turning_dihedrals(self.topology)
        self.dihedrals = backbone | more
        self.methyl_groups = [group for group in attached_hydrogens(self.topology).values() if len(group) == 3]
        if encoding is None:
            self.features = torch.nn.functional.one_hot(torch.tensor(atom_classes(self.topology))).float()
        else:
            self.features = encode_atoms(self.topology, encoding, n_places)
        self.stereocentres = find_stereocentres(self.topology)
        if state is not None:
            self.state = self.state_of(state)

    @classmethod
    def from_openmm(
        cls,
        system: openmm.System,
        topology: app.Topology,
        positions: np.ndarray | unit.Quantity,
        name: str,
        temperature: float,
        **settings: Any,
    ) -> Self:
        """The molecule that OpenMM's own objects describe.

        Args:
            system: without constraints, box, barostat and virtual sites; with or without an implicit solvent.
            topology: of the same atoms, with an element each and all bonds.
            positions: (n_atoms, 3), in nm where they have no unit.
            settings: more of the class's own, as ``state`` and ``energy_backend``; nonbonded method and cutoff are the
                System's.

        A run's config names files: `save` writes them.

        >>> from boltznce import load_system
        >>> aldp = load_system("aldp")
        >>> parts = aldp.openmm_system(), aldp.openmm_topology(), aldp.positions
        >>> again = MolecularSystem.from_openmm(*parts, name="mine", temperature=300)
        >>> again, again.equals(aldp)
        (MolecularSystem(mine, 22 atoms, 300 K, openmm.System), True)
        """
        method, cutoff_nm = nonbonded_of(system)
        return cls(name, (topology, positions), system, temperature, method, cutoff_nm, **settings)

    def save(self, folder: Path | str) -> Path:
        """Write ``<name>.pdb``, ``<name>.xml`` (the System) and ``<name>.yaml``, a config that names the two.

        The path of the last, which is returned, goes as ``system=`` into a run, and into `load_system`. UserError for a
        folder that has anything else in it.
        """
        nonbonded = {"nonbonded_method": self._nonbonded["nonbonded"], "cutoff_nm": self._nonbonded["cutoff_nm"]}
        kept = ("dihedrals", "encoding", "n_places", "energy_backend", "n_workers", "compile")
        settings = {"temperature": self.temperature, **nonbonded, "state": self.state and self.state.setting}
        settings |= {key: self._settings[key] for key in kept}
        return save_molecule(Path(folder), self.name, self.topology, self._structure_nm, self._openmm_system, settings)

    def __repr__(self) -> str:
        energy = " + ".join(self.forcefield)
        return f"{type(self).__name__}({self.name}, {self.n_atoms} atoms, {self.temperature:g} K, {energy})"

    @cached_property
    @ordinary_tensors()
    def positions(self) -> Tensor:
        """The structure at the nearest minimum of the force field, (n_atoms, 3) in nm, float32."""
        integrator = openmm.VerletIntegrator(0.001)
        context = openmm.Context(self._openmm_system, integrator, openmm.Platform.getPlatformByName("Reference"))
        context.setPositions(self._structure_nm)
        openmm.LocalEnergyMinimizer.minimize(context)
        minimized = context.getState(positions=True).getPositions(asNumpy=True).value_in_unit(unit.nanometer)
        return torch.from_numpy(minimized - minimized.mean(0)).float()

    def energy(self, x: Array) -> Array:
        """Reduced energy U(x) / kT of positions (batch, n_atoms, 3) in nm; (batch,), in the dtype of x.

        +inf where there is none: positions that are not finite, atoms on top of each other where the energy has no
        finite value there. An array of an array.
        """
        u = self._potential(self.tensor_of(x)) / (GAS_CONSTANT * self.temperature)
        return u if isinstance(x, Tensor) else u.numpy()

    def dihedral(self, x: Array, name: str) -> Array:
        """A named dihedral of positions (batch, n_atoms, 3), (batch,) in (-π, π], IUPAC sign; tensor or array."""
        return self.named_coordinate(name)(x if isinstance(x, Tensor | np.ndarray) else self.tensor_of(x).numpy())

    def named_coordinate(self, name: str) -> Coordinate:
        """A dihedral: one of ``dihedrals``, or of a residue by its number, as ``phi_2`` and ``chi1_2``.

        ``chi1`` is that of the first residue that has it (see `residue_dihedrals`).
        """
        if (atoms := self.dihedrals.get(name) or self._of_residues.get(name)) is None:
            names = ", ".join([*self.dihedrals, *self._of_residues])
            raise UserError(f"{self.name} has no dihedral {name!r}: choose one of {names}.")
        return geometric(name, "dihedral", atoms)

    @cached_property
    def _of_residues(self) -> dict[str, Four]:
        return residue_dihedrals(self.topology)

    @property
    def identity(self) -> dict[str, Any]:
        return {"name": self.name, "temperature": self.temperature, **self._unchanging}

    @cached_property
    def _unchanging(self) -> dict[str, Any]:
        """The entries of the identity that are the same at every temperature."""
        centres = torch.tensor(self.stereocentres, dtype=torch.long).view(-1, 4)
        signs = handedness(torch.from_numpy(self._structure_nm), centres).tolist()
        elements = [atom.element.symbol for atom in self.topology.atoms]
        entries = {"force_field": self._files} | molecule_identity(elements, self.bonds, signs)
        if self.energy_backend == "xtb":
            return entries | {"charge": total_charge(self._openmm_system)}
        xml = openmm.XmlSerializer.serialize(self._openmm_system)
        constraints = self._openmm_system.getNumConstraints()
        return entries | self._nonbonded | {"constraints": constraints, "openmm": openmm_digest(xml)}

    def chirality(self, x: Array) -> Array:
        """Per stereocentre +1 for the handedness of the structure and -1 for its mirror image, (batch, n_centres)."""
        centres = torch.tensor(self.stereocentres, dtype=torch.long).view(-1, 4)
        reference = handedness(torch.from_numpy(self._structure_nm), centres)
        given = as_tensor(x)
        signs = handedness(given, centres) * reference.to(given)
        return signs if isinstance(x, Tensor) else signs.numpy()

    def isomers(self, x: Array) -> Array:
        """Per peptide bond +1 where it is cis or trans as in ``positions``, -1 where turned, (batch, n_omegas)."""
        given = as_tensor(x)
        if not self.omegas:
            signs = given[:, :0, 0]
        else:
            omegas = [list(self.dihedrals[name]) for name in self.omegas]
            angles = (dihedral_angle(each[:, omegas]) for each in (given, self.positions[None].to(given)))
            given_side, own_side = (torch.where(angle.cos() < 0, -1.0, 1.0).to(given) for angle in angles)
            signs = given_side * own_side
        return signs if isinstance(x, Tensor) else signs.numpy()

    def openmm_system(self) -> openmm.System:
        """A fresh copy of the force field's OpenMM System, without constraints, to change at will."""
        return openmm.XmlSerializer.clone(self._openmm_system)

    def openmm_topology(self) -> app.Topology:
        return self._openmm_topology


def make_potential(
    backend: str, system: openmm.System, topology: app.Topology, n_workers: int | None, compile: str | bool
) -> TorchForceField | ExternalEnergy:
    """What computes energies in kJ/mol: positions (batch, n_atoms, 3) in nm -> (batch,)."""
    if backend == "torch":
        return TorchForceField(system, compile)
    if backend == "openmm":
        return OpenMMEnergy(system, n_workers)
    return XTBEnergy([atom.element.atomic_number for atom in topology.atoms()], total_charge(system), n_workers)


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


def handedness(x: Tensor, centres: Tensor) -> Tensor:
    """Sign (±1) of the triple product of each centre's bonds: (..., n_atoms, 3), (n_centres, 4) -> (..., n_centres)."""
    corners = x[..., centres[:, 1:], :] - x[..., centres[:, :1], :]
    volume = torch.linalg.det(corners)
    return torch.where(volume > 0, 1.0, -1.0).to(x)
