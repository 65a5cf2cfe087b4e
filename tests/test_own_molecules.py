"""Molecules of others' making: OpenMM's objects, files of Amber, CHARMM, GROMACS and mmCIF; what is wrong with them."""

import shutil
from pathlib import Path

import numpy as np
import openmm
import pytest
import torch
from openmm import app, unit
from openmm_reference import distorted, energy_and_force, reference, relative

import boltznce as bz
from boltznce import MolecularSystem, UserError, load_system
from boltznce.config import compose
from boltznce.methods.preflight import preflight
from boltznce.methods.views import views_of
from boltznce.run import start_folder
from boltznce.systems.structures import STRUCTURES
from boltznce.trust import check_trusted

FILES = Path(__file__).parent / "files"
FREE = {"constraints": None, "rigidWater": False, "removeCMMotion": False}
ALDP = app.PDBFile(str(STRUCTURES / "aldp.pdb"))
# structure, force field, solvent; the System as OpenMM's own reader makes it
READ = {
    "Amber": ("aldp.inpcrd", ["aldp.prmtop"], "OBC2"),
    "Amber, a vacuum": ("aldp.inpcrd", ["aldp.prmtop"], None),
    "Amber, a ligand": ("ligand.inpcrd", ["ligand.prmtop"], "GBn2"),
    "GROMACS": ("aldp.gro", ["aldp.top"], None),
    "CHARMM": ("acetaldehyde.crd", ["acetaldehyde.psf", "acetaldehyde.prm"], "OBC2"),
}


def made_by_openmm(files, solvent):
    model = {} if solvent is None else {"implicitSolvent": getattr(app, solvent), "sasaMethod": "ACE"}
    first, *more = (str(FILES / file) for file in files)  # all but GROMACS's know solvents
    if first.endswith("prmtop"):
        return app.AmberPrmtopFile(first).createSystem(**FREE, **model)
    if first.endswith("psf"):
        return app.CharmmPsfFile(first).createSystem(app.CharmmParameterSet(*more), **FREE, **model)
    return app.GromacsTopFile(first).createSystem(**FREE, **model)


def read(structure, files, solvent=None, **settings):
    paths = [str(FILES / file) for file in files]
    settings = {"name": "mine", "temperature": 300.0, "compile": False, "implicit_solvent": solvent} | settings
    return MolecularSystem(structure=FILES / structure, forcefield=paths, **settings)


def given(**changes):
    """Alanine dipeptide as objects; what OpenMM's createSystem is told otherwise."""
    settings = FREE | changes
    system = app.ForceField("amber99sbildn.xml", "amber99_obc.xml").createSystem(ALDP.topology, **settings)
    return system, ALDP.topology, ALDP.positions


@pytest.fixture(scope="module")
def ligand():
    return read(*READ["Amber, a ligand"])


# ---- energies -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", READ)
def test_energies_are_those_of_openmms_own_reader(kind):
    structure, files, solvent = READ[kind]
    system = read(structure, files, solvent)
    x = distorted(system.positions.double().repeat(3, 1, 1), 0.01)
    energies, forces = reference(made_by_openmm(files, solvent), x)
    kt = unit.MOLAR_GAS_CONSTANT_R.value_in_unit(unit.kilojoule_per_mole / unit.kelvin) * 300
    ours, our_forces = energy_and_force(system.energy, x)
    torch.testing.assert_close(ours, energies / kt, rtol=1e-6, atol=1e-4)
    assert relative(our_forces, forces / kt) < 1e-5
    assert files[0] in repr(system)
    assert (solvent or "mine") in repr(system)


def test_ambers_file_is_openmms_force_field():
    theirs = read(*READ["Amber"])
    ours = load_system(
        "aldp",
        structure=(theirs.openmm_topology(), theirs.positions),
        forcefield=["amber14-all.xml", "implicit/obc2.xml"],
        compile=False,
    )
    x = distorted(ours.positions.double().repeat(3, 1, 1), 0.01)
    torch.testing.assert_close(theirs.energy(x), ours.energy(x), rtol=0, atol=0.02)  # radii and charges are rounded


@pytest.mark.parametrize("cut", [{}, {"nonbonded_method": "CutoffNonPeriodic", "cutoff_nm": 0.6}])
@pytest.mark.parametrize("model", ["OBC1", "GBn2"])
def test_an_implicit_solvent_that_is_added_is_that_of_openmms_files(model, cut):
    files = ["amber99sbildn.xml", f"implicit/{model.lower()}.xml"]
    ours = load_system("aldp", forcefield=files, compile=False, **cut)
    added = load_system("aldp", forcefield=files[:1], implicit_solvent=model, compile=False, **cut)
    assert added.equals(ours)
    alone = load_system("aldp", forcefield=files[:1], compile=False, **cut)
    parts = alone.openmm_system(), alone.openmm_topology(), alone.positions
    assert MolecularSystem.from_openmm(*parts, "mine", 300.0, implicit_solvent=model).equals(ours)
    x = distorted(ours.positions.double().repeat(3, 1, 1), 0.01)
    theirs = read("aldp.gro", ["aldp.top"], model, **cut)
    torch.testing.assert_close(theirs.energy(x), ours.energy(x), rtol=0, atol=0.02)  # its numbers are rounded


def test_coordinates_may_be_a_pdb_or_an_mmcif_file(tmp_path):
    with open(tmp_path / "aldp.cif", "w") as file:
        app.PDBxFile.writeFile(ALDP.topology, ALDP.positions, file, keepIds=True)
    assert load_system("aldp", structure=tmp_path / "aldp.cif").equals(load_system("aldp"))
    x = load_system("aldp").positions[None]
    from_gro, from_pdb = (read(each, ["aldp.top"]) for each in ("aldp.gro", STRUCTURES / "aldp.pdb"))
    assert from_gro.equals(from_pdb)
    torch.testing.assert_close(from_gro.energy(x), from_pdb.energy(x))


# ---- objects and their files ----------------------------------------------------------------------------------------


def test_openmms_objects_are_the_same_molecule_as_their_files(tmp_path):
    aldp = load_system("aldp")
    mine = MolecularSystem.from_openmm(*given(), name="mine", temperature=300.0, state=["phi", [0.0, 2.0]])
    assert mine.equals(aldp)
    assert mine.topology == aldp.topology
    assert torch.equal(mine.positions, aldp.positions)
    named = MolecularSystem.from_openmm(*given(), name="aldp", temperature=300.0, state=["phi", [0.0, 2.0]])
    assert named.reference() == aldp.reference()
    cut = {"nonbondedMethod": app.CutoffNonPeriodic, "nonbondedCutoff": 0.8, "removeCMMotion": True}
    other = MolecularSystem.from_openmm(*given(**cut), name="mine", temperature=300.0)
    assert not other.equals(aldp)
    assert other.equals(load_system("aldp", nonbonded_method="CutoffNonPeriodic", cutoff_nm=0.8))
    for system in (mine, other):
        config = system.at_temperature(310.0).save(tmp_path / "saved")
        again = load_system(config)
        assert again.equals(system.at_temperature(310.0))
        assert again.state == system.state
        assert again.forcefield == [str(tmp_path / "saved" / "mine.xml")]
        torch.testing.assert_close(
            again.energy(aldp.positions[None]), system.at_temperature(310.0).energy(aldp.positions[None])
        )
    (tmp_path / "saved" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match=r"thesis\.txt"):
        mine.save(tmp_path / "saved")


@pytest.mark.parametrize("method", ["boltznce", "tbg", "tabg"])
def test_runs_of_a_saved_molecule_pass_what_is_checked_before_them(ligand, method, tmp_path):
    config = ligand.save(tmp_path / "ligand")
    words = [f"system={config}", f"method={method}", "budget=smoke", f"data_dir={tmp_path}", "threads=1"]
    preflight(compose("train", words))


@pytest.mark.parametrize("kind", ["Amber", "Amber, a ligand", "GROMACS", "CHARMM"])
def test_a_runs_folder_holds_the_files_of_its_molecule(kind, tmp_path):
    """The originals are gone, and one of GROMACS's includes another one."""
    structure, files, solvent = READ[kind]
    shutil.copytree(FILES, tmp_path / "files")
    top = tmp_path / "files" / "aldp.top"
    text = top.read_text()
    start, end = text.index("[ atomtypes ]"), text.index("[ moleculetype ]")
    (tmp_path / "files" / "ff").mkdir()
    (tmp_path / "files" / "ff" / "types.itp").write_text(text[start:end])
    top.write_text(text[:start] + '#include "ff/types.itp"\n' + text[end:])
    places = ",".join(str(tmp_path / "files" / file) for file in files)
    words = ["system=aldp", "system.name=mine", f"system.structure={tmp_path / 'files' / structure}"]
    words += [f"system.forcefield=[{places}]", "system.state=null", "method=tabg", "budget=smoke", "threads=1"]
    words += [f"+system.implicit_solvent={solvent}"] if solvent else []
    run = start_folder(tmp_path / "run", compose("train", [*words, f"data_dir={tmp_path}"]))
    shutil.rmtree(tmp_path / "files")
    shutil.move(tmp_path / "run", tmp_path / "moved")
    assert bz.load_run(tmp_path / "moved").system.equals(read(structure, files, solvent))
    assert run


# ---- torsions of a general molecule -------------------------------------------------------------------------------


def test_a_ligand_is_seen_by_the_bonds_that_turn(ligand):
    """C1 O1 H6 H1 H2 C2 O2 H7 H3 C3 CL H4 H5: 3-chloropropane-1,2-diol, whose C2 is a stereocentre."""
    assert list(ligand.dihedrals) == ["tors1", "tors2", "tors3", "tors4"]
    assert ligand.dihedrals["tors4"] == (0, 5, 9, 10)  # C1 C2 C3 CL
    assert [view.symbols for view in views_of(ligand)] == [("tors1", "tors2")]
    assert [centre for centre, *_ in ligand.stereocentres] == [5]
    x = ligand.positions[None]
    assert (ligand.chirality(x), ligand.chirality(-x)) == (1, -1)
    assert ligand.isomers(x).shape == (1, 0)
    assert ligand.state is None
    named = read(*READ["Amber, a ligand"], dihedrals={"chi": [0, 5, 9, 10]}, state=["chi", [0.0, 2.0]])
    assert list(named.dihedrals) == ["chi"]
    assert named.in_state(x).shape == (1,)


# ---- mistakes -------------------------------------------------------------------------------------------------------


def with_box(prmtop):
    """The file as of a periodic box: IFBOX, the eighth of the third ten pointers, and the box."""
    lines = prmtop.splitlines()
    row = next(k for k, line in enumerate(lines) if line.startswith("%FLAG POINTERS")) + 4
    lines[row] = lines[row][:56] + "       1" + lines[row][64:]
    box = "".join(f"{value:16.8E}" for value in (90.0, 30.0, 30.0, 30.0))
    return "\n".join([*lines, "%FLAG BOX_DIMENSIONS", "%FORMAT(5E16.8)", box, ""])


@pytest.mark.parametrize(
    ("structure", "files", "settings", "message"),
    [
        ("aldp.inpcrd", ["boxed.prmtop"], {}, r"periodic box.*strip"),
        ("aldp.inpcrd", ["bare.prmtop"], {"implicit_solvent": "OBC2"}, r"no radii.*PBradii"),
        ("ligand.inpcrd", ["aldp.prmtop"], {}, r"positions of 13 atoms, and the molecule has 22"),
        ("aldp.inpcrd", ["aldp.prmtop", "amber14-all.xml"], {}, r"Amber's kind: leave the others out"),
        ("aldp.inpcrd", ["amber14-all.xml"], {}, r"needs a structure that has elements and bonds"),
        ("aldp.pdb", ["amber99sb.xml", "amber99_obc.xml"], {"implicit_solvent": "OBC2"}, r"solvent already.*null"),
        ("aldp.inpcrd", ["aldp.prmtop"], {"implicit_solvent": "PB"}, r"HCT, OBC1, OBC2, GBn, GBn2"),
        ("ACE-A-NME", ["aldp.prmtop"], {}, r"not of the same atoms in the same order.*ACE 1 "),
        ("acetaldehyde.crd", ["acetaldehyde.psf"], {}, r"cannot be loaded, or does not fit"),
        ("acetaldehyde.crd", ["acetaldehyde.prm"], {}, r"needs a structure|cannot be loaded"),
        ("ligand.inpcrd", ["broken.prmtop"], {}, r"cannot be loaded, or does not fit"),
        ("aldp.gro", ["missing.top"], {}, r"cannot be loaded, or does not fit|needs a structure"),
        ("broken.gro", ["aldp.top"], {}, r"cannot be read as a file of GROMACS"),
        ("broken.inpcrd", ["aldp.prmtop"], {}, r"cannot be read as a file of Amber"),
        ("broken.cif", ["amber14-all.xml"], {}, r"cannot be read as an mmCIF file"),
        ("aldp.gro", ["rigid.top"], {}, r"constraints, which is not simulated"),
    ],
)
def test_files_that_do_not_fit_are_told(tmp_path, structure, files, settings, message):
    shutil.copytree(FILES, tmp_path, dirs_exist_ok=True)
    shutil.copy(STRUCTURES / "aldp.pdb", tmp_path)
    prmtop = (FILES / "aldp.prmtop").read_text()
    (tmp_path / "boxed.prmtop").write_text(with_box(prmtop))
    start = prmtop.index("%FLAG RADII")
    (tmp_path / "bare.prmtop").write_text(prmtop[:start] + prmtop[prmtop.index("%FLAG", start + 5) :])
    (tmp_path / "broken.prmtop").write_text(prmtop[:2000])
    (tmp_path / "rigid.top").write_text(
        (FILES / "aldp.top").read_text().replace("[ angles ]", "[ constraints ]\n2 1 2 0.109\n\n[ angles ]")
    )
    for name in ("broken.gro", "broken.inpcrd", "broken.cif"):
        (tmp_path / name).write_text("nothing\n1\n")
    paths = [file if file.endswith("xml") else str(tmp_path / file) for file in files]
    place = structure if structure == "ACE-A-NME" else tmp_path / structure
    with pytest.raises(UserError, match=message):
        load_system("aldp", structure=place, forcefield=paths, **settings)


def no_bonds():
    topology = app.Topology()
    residue = topology.addResidue("LIG", topology.addChain())
    for atom in ALDP.topology.atoms():
        topology.addAtom(atom.name, atom.element, residue)
    return topology


def periodic():
    force = openmm.HarmonicBondForce()
    force.setUsesPeriodicBoundaryConditions(True)
    return force


def changed(force=None, mass=12.0):
    system, topology, positions = given()
    if force is not None:
        system.addForce(force)
    system.setParticleMass(0, mass)
    return system, topology, positions


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (lambda: given(constraints=app.HBonds), r"constraints.*constraints=None"),
        (lambda: changed(periodic()), r"periodic boundaries.*nonbondedMethod=NoCutoff"),
        (lambda: changed(openmm.MonteCarloBarostat(1.0, 300.0)), "MonteCarloBarostat"),
        (lambda: changed(mass=0.0), "particles without mass"),
        (lambda: (given()[0], no_bonds(), ALDP.positions), r"no bond between LIG 1 .*CONECT"),
        (lambda: (openmm.System(), ALDP.topology, ALDP.positions), "0 particles.*22 atoms"),
        (lambda: (given()[0], ALDP.topology, ALDP.positions[:-1]), r"positions of 21 atoms.*has 22"),
    ],
)
def test_objects_that_are_no_molecule_here_are_told(parts, message):
    with pytest.raises(UserError, match=message):
        MolecularSystem.from_openmm(*parts(), name="mine", temperature=300.0)


def test_a_config_says_the_cutoff_that_a_serialized_system_has(tmp_path):
    system, _, _ = given(nonbondedMethod=app.CutoffNonPeriodic, nonbondedCutoff=0.9)
    path = tmp_path / "system.xml"
    path.write_text(openmm.XmlSerializer.serialize(system))
    with pytest.raises(UserError, match=r"nonbonded_method=CutoffNonPeriodic and cutoff_nm=0\.9"):
        load_system("aldp", forcefield=[str(path)])
    assert (
        load_system("aldp", forcefield=[str(path)], nonbonded_method="CutoffNonPeriodic", cutoff_nm=0.9).n_atoms == 22
    )


def test_elements_without_a_radius_are_told(tmp_path):
    """Bromomethane, whose radius OpenMM would take to be that of oxygen."""
    topology = app.Topology()
    residue = topology.addResidue("MBR", topology.addChain())
    atoms = [
        topology.addAtom(f"{s}{k}", app.Element.getBySymbol(s), residue) for k, s in enumerate(["C", "Br", *"HHH"])
    ]
    for atom in atoms[1:]:
        topology.addBond(atoms[0], atom)
    types = "".join(
        f'<Type name="{a.name}" class="{a.name}" element="{a.element.symbol}" mass="{a.element.mass._value}"/>'
        for a in atoms
    )
    inside = "".join(f'<Atom name="{a.name}" type="{a.name}" charge="0"/>' for a in atoms)
    inside += "".join(f'<Bond atomName1="C0" atomName2="{a.name}"/>' for a in atoms[1:])
    pairs = "".join(f'<Atom type="{a.name}" charge="0.0" sigma="0.3" epsilon="0.1"/>' for a in atoms)
    (tmp_path / "mbr.xml").write_text(
        f'<ForceField><AtomTypes>{types}</AtomTypes><Residues><Residue name="MBR">{inside}</Residue></Residues>'
        f'<NonbondedForce coulomb14scale="0.8" lj14scale="0.5">{pairs}</NonbondedForce></ForceField>'
    )
    x = 0.11 * np.array([[0, 0, 0], [0, 0, 1.7], [0.9, 0, -0.3], [-0.5, 0.8, -0.3], [-0.5, -0.8, -0.3]])
    settings = {"name": "mbr", "structure": (topology, x), "temperature": 300.0, "compile": False}
    MolecularSystem(forcefield=[str(tmp_path / "mbr.xml")], **settings)
    with pytest.raises(UserError, match=r"no radius for Br \(MBR 1 Br1\).*prmtop"):
        MolecularSystem(forcefield=[str(tmp_path / "mbr.xml"), "implicit/obc2.xml"], **settings)


# ---- trust ----------------------------------------------------------------------------------------------------------


def payload(state):
    raise AssertionError


@pytest.mark.parametrize("inner", [False, True])
def test_python_in_a_serialized_system_is_not_run(tmp_path, inner):
    if not hasattr(openmm, "PythonForce"):
        pytest.skip("this OpenMM has none")
    system, force = given()[0], openmm.PythonForce(payload)
    if inner:
        outer = openmm.CustomCVForce("a")
        outer.addCollectiveVariable("a", force)
        force = outer
    system.addForce(force)
    text = openmm.XmlSerializer.serialize(system)
    start = text.index('function="') + len('function="')
    wanted = f"cposix\nmkdir\n(V{tmp_path / 'sentinel'}\ntR.".encode().hex()  # a pickle that makes a folder
    path = tmp_path / "system.xml"
    path.write_text(text[:start] + wanted + text[text.index('"', start) :])
    with pytest.raises(UserError, match="PythonForce"):
        load_system("aldp", forcefield=[str(path)], energy_backend="openmm")
    # two readers may not agree on where a comment ends
    hidden = path.read_text().replace("<Force ", "<!-- > <Force ", 1).replace("</Forces>", "--> </Forces>")
    path.write_text(hidden)
    assert load_system("aldp", forcefield=[str(path)]).openmm_system().getNumForces() == 0
    assert not (tmp_path / "sentinel").exists()


def test_files_of_others_may_name_files_of_amber_and_gromacs(tmp_path):
    for kind in READ:
        check_trusted({"forcefield": [str(FILES / file) for file in READ[kind][1]]}, "here")
    top = tmp_path / "evil.top"
    for outside in ("/etc/passwd", "../secret.itp"):
        top.write_text(f'#include "{outside}"\n')
        with pytest.raises(UserError, match="from outside its folder"):
            check_trusted({"forcefield": [str(top)]}, "here")
    top.write_text('#include "evil.top"\n')
    check_trusted({"forcefield": [str(top)]}, "here")
    with pytest.raises(UserError, match="cannot be loaded"):
        read("aldp.gro", [top])
