"""Data, references and runs are known by what they are of: names, and the names of files, decide nothing."""

import copy
import dataclasses
import functools
import os
import shutil
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import openmm
import pytest
import torch
import yaml
from omegaconf import OmegaConf
from openmm import app

import boltznce as bz
from boltznce.config import build, compose, config_dir
from boltznce.data.dataset import Dataset
from boltznce.data.matching import require_system
from boltznce.data.members import load_data, make_data
from boltznce.data.reference import require_reference
from boltznce.data.simulate import plan
from boltznce.methods.provenance import data_in_words, energy_in_words, reference_in_words
from boltznce.methods.workspace import Workspace
from boltznce.run_folder import RunFolder
from boltznce.systems.identity import openmm_digest
from boltznce.systems.structures import STRUCTURES

AMBER = Path(app.__file__).parent / "data"
CUTOFF = {"nonbonded_method": "CutoffNonPeriodic", "cutoff_nm": 0.5}
AMBER96 = {"forcefield": ["amber96.xml", "amber96_obc.xml"]}


@functools.cache
def aldp():
    return bz.load_system("aldp")


def mirrored(folder):
    """A PDB file of D-alanine dipeptide, atoms as in the shipped one."""
    pdb = app.PDBFile(str(STRUCTURES / "aldp.pdb"))
    x = pdb.getPositions(asNumpy=True) * np.array([-1.0, 1.0, 1.0])
    with open(folder / "d.pdb", "w") as handle:
        app.PDBFile.writeFile(pdb.topology, x, handle)
    return folder / "d.pdb"


def reordered(folder):
    """A PDB file of alanine dipeptide whose Cα and Hα stand in the other order."""
    lines = (STRUCTURES / "aldp.pdb").read_text().splitlines()
    atoms = [k for k, line in enumerate(lines) if line.startswith(("ATOM", "HETATM"))]
    a, b = (next(k for k in atoms if lines[k].split()[2] == name) for name in ("CA", "HA"))
    lines[a], lines[b] = lines[b], lines[a]
    (folder / "order.pdb").write_text("\n".join(lines) + "\n")
    return folder / "order.pdb"


def write_data(folder, system, *, scale=1.0, energies=lambda u: u, meta=None, n=40):
    """A dataset of frames about the system's minimum, its energies true but for what is asked for."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(n, system.n_atoms, system.dim, generator=generator)
    x = system.sample(n, generator) if system.exact else system.positions + 0.005 * noise
    u = energies(system.energy(x.double()).numpy())
    meta = {"system": system.identity} if meta is None else meta
    return Dataset.write(folder, scale * x.float().numpy(), u, meta=meta)


def test_data_of_another_molecule_are_refused_with_what_differs(tmp_path):
    """Whatever is recorded: of data by an older version the energies, and the handedness of the frames, tell."""
    write_data(tmp_path / "new", aldp())
    write_data(tmp_path / "old", aldp(), meta={"system": {"name": "aldp", "force_field": aldp().forcefield}})
    others = [
        (aldp().at_temperature(400.0), "another temperature .300, not 400.", "as if they were energies at 300 K"),
        (bz.load_system("aldp", **CUTOFF), "another cutoff .none, not 0.5 nm.", "recorded energies are off by"),
        (bz.load_system("aldp", structure=reordered(tmp_path)), "another order of atoms", "atoms in another order"),
        (bz.load_system("aldp", structure=mirrored(tmp_path)), "another handedness", "another handedness"),
        (bz.load_system("aldp", **AMBER96), *2 * ["another force field .*99.*, not .*96"]),
    ]
    for system, with_record, without in others:
        for folder, words in ("new", with_record), ("old", without):
            with pytest.raises(bz.UserError, match=words):
                load_data(system, system, tmp_path / folder)
    same = copy.copy(aldp())
    same.name, same.state = "mine", bz.load_system("double_well").state
    for folder in ("new", "old"):
        assert len(load_data(same, same, tmp_path / folder)) == 40


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"scale": 10.0}, "positions were not in nm"),
        ({"energies": lambda u: 2.4943 * u}, "kJ/mol"),
        ({"energies": lambda u: u + 7.0}, "another zero"),
        ({"energies": lambda u: np.where(np.arange(len(u)) == len(u) - 1, u + 0.2, u)}, "off by"),
    ],
    ids=["angstrom", "kJ/mol", "zero", "one frame"],
)
def test_frames_that_do_not_have_their_energies(tmp_path, wrong, reason):
    write_data(tmp_path / "set", aldp(), meta={"settings": {"method": "mine"}}, **wrong)
    with pytest.raises(bz.UserError, match=reason):
        load_data(aldp(), aldp(), tmp_path / "set")


def test_data_in_the_plane(tmp_path):
    system = bz.load_system("double_well")
    write_data(tmp_path / "set", system)
    for settings, words in ({"temperature": 2.0}, "temperature .1, not 2"), ({"tilt": 0.6}, "tilt .0.5, not 0.6"):
        other = bz.load_system("double_well", **settings)
        with pytest.raises(bz.UserError, match=words):
            load_data(other, other, tmp_path / "set")
    same = bz.load_system("double_well", name="mine", box=[[-3, 3], [-3, 3]])
    assert len(load_data(same, same, tmp_path / "set")) == 40


def variants(folder):
    """Systems, (what the physics is, system): two of a kind differ in what changes no energy of a frame."""
    structures = {"D": mirrored(folder), "order": reordered(folder)}
    (folder / "renamed.xml").write_text((AMBER / "amber96.xml").read_text())
    aldp_like = {
        "aldp": [{}, {"name": "mine", "energy_backend": "openmm"}, {"state": ["psi", [0.0, 1.0]]}],
        "400 K": [{"temperature": 400.0}],
        "0.5 nm": [CUTOFF],
        "2 nm": [CUTOFF | {"cutoff_nm": 2.0}],
        "amber96": [AMBER96, {"forcefield": [str(folder / "renamed.xml"), "amber96_obc.xml"]}],
        "gbn2": [{"forcefield": ["amber99sbildn.xml", "implicit/gbn2.xml"]}],
        "in vacuo": [{"forcefield": ["amber99sbildn.xml"]}],
        "other atoms first": [{"structure": "ACE-A-NME"}],
        **{name: [{"structure": path}] for name, path in structures.items()},
        "another molecule": [{"structure": "AK"}],
    }
    plane = {
        "gaussians8": [{}, {"name": "mine", "box": [[-3, 3], [-3, 3]]}, {"std": 0.11}, {"temperature": 2.0}],
        "double_well": [{}, {"tilt": 0.6}, {"barrier": 5.1}, {"stiffness": 4.2}, {"temperature": 1.1}],
        **{name: [{}] for name in ("gaussians8_unequal", "mueller_brown", "two_moons", "gaussians40", "checkerboard")},
    }
    for kind, each in aldp_like.items():
        yield from ((kind, bz.load_system("aldp", **settings)) for settings in each)
    for name, each in plane.items():
        for settings in each:
            physics = {key: value for key, value in settings.items() if key not in ("name", "box")}
            yield f"{name} {physics}", bz.load_system(name, **settings)


@pytest.mark.slow
def test_data_of_each_system_are_taken_by_those_of_its_physics_alone(tmp_path):
    """Every pair, with the full record, with that of an older version, and with none: (tried, right) is printed."""
    systems = list(variants(tmp_path))
    wrong, tried = [], 0
    for number, (kind, maker) in enumerate(systems):
        dataset = write_data(tmp_path / str(number), maker)
        older = {key: value for key, value in maker.identity.items() if key in ("name", "force_field")}
        for record in (maker.identity, older, {}):
            data = dataclasses.replace(dataset, meta=dataset.meta | {"system": record})
            for other, system in systems:
                tried += 1
                try:
                    require_system(tmp_path / str(number), data, system)
                    taken = True
                except bz.UserError as error:
                    taken, message = False, str(error)
                if taken != (kind == other) or not (taken or len(message) < 550):
                    wrong.append((kind, other, len(record), taken))
    print(f"{tried} pairs of data and system, {tried - len(wrong)} right")
    assert not wrong


# ---- how data were made ----------------------------------------------------------------------------------------------


def test_runs_of_two_seeds_share_data_and_other_draws_are_not_taken_for_these(tmp_path):
    sweep = compose("train", ["system=double_well", "budget=smoke", "seed=1"])
    assert (sweep.seed, sweep.data.seed, sweep.data.accept) == (1, 0, "same")
    system, exact = bz.load_system("double_well"), {"simulation": None, "n_samples": 50}
    first = make_data(system, tmp_path, seed=0, **exact)["double_well"]
    assert make_data(system, tmp_path, seed=sweep.data.seed, **exact)["double_well"].digest == first.digest
    with pytest.raises(bz.UserError, match=r"seed: 0, not 1\).*data.folder="):
        make_data(system, tmp_path, seed=1, **exact)
    with pytest.raises(bz.UserError, match="n_samples: 50, not 60"):
        make_data(system, tmp_path, simulation=None, n_samples=60)
    assert make_data(system, tmp_path, seed=1, accept="any", **exact)["double_well"].digest == first.digest
    with pytest.raises(bz.UserError, match=r"data.accept=anything: choose one of same, any"):
        make_data(system, tmp_path, accept="anything", **exact)


def test_simulations_of_other_settings(tmp_path):
    """Of a dataset, and in the same words of an unfinished simulation."""
    asked = {"method": "umbrella", "duration": 10.0, "n_repeats": 1, "frame_interval": 0.5, "segment_length": 5.0}
    begun = plan(aldp(), tmp_path / "begun", **asked)
    recorded = begun.jobs[0].settings(n_repeats=1)
    meta = {"system": aldp().identity, "settings": yaml.safe_load(yaml.safe_dump(recorded))}
    write_data(tmp_path / "set", aldp(), meta=meta)
    assert len(make_data(aldp(), tmp_path / "set", simulation=asked)["aldp"]) == 40
    for change, words in (
        ({"duration": 20.0}, "duration: 10.0, not 20.0"),
        ({"kappa": 80.0}, "kappa: 60.0, not 80.0"),
        ({"seed": 1, "n_repeats": 2}, "seed: 0, not 1; n_repeats: 1, not 2"),
        ({"method": "replica_exchange"}, "method: umbrella, not replica_exchange"),
        ({"dihedral": "psi"}, "dihedral"),
    ):
        with pytest.raises(bz.UserError, match=f"other settings .*{words}"):
            make_data(aldp(), tmp_path / "set", simulation=asked | change)
        assert len(make_data(aldp(), tmp_path / "set", simulation=asked | change, accept="any")["aldp"]) == 40
    with pytest.raises(bz.UserError, match=r"unfinished simulation with other settings .seed: 0, not 1"):
        plan(aldp(), tmp_path / "begun", **asked, seed=1)
    write_data(tmp_path / "foreign", aldp(), meta={"settings": {"method": "mine"}})
    assert len(make_data(aldp(), tmp_path / "foreign", simulation=asked)["aldp"]) == 40
    with pytest.raises(bz.UserError, match="no simulation of this library has made: choose another name"):
        plan(aldp(), tmp_path / "foreign", **asked)


# ---- the digest ------------------------------------------------------------------------------------------------------


def test_the_digest_is_of_the_energy_and_nothing_else():
    xml = openmm.XmlSerializer.serialize(aldp().openmm_system())
    digest = openmm_digest(xml)
    root = ElementTree.fromstring(xml)
    root.set("openmmVersion", "99.1")
    for particle in root.iter("Particle"):
        particle.attrib.pop("mass", None)
    bonds = next(element for element in root.iter("Bonds") if len(element) > 1)
    bonds[:] = list(bonds)[::-1]
    root.find("Forces")[:] = list(root.find("Forces"))[::-1]
    assert openmm_digest(ElementTree.tostring(root, encoding="unicode")) == digest
    numbers = [
        (element, key)
        for force in root.find("Forces")
        for element in force.iter()
        for key, value in element.attrib.items()
        if key not in ("version", "name") and value.replace(".", "").replace("-", "").isdigit()
    ]
    for k in np.random.default_rng(0).choice(len(numbers), size=12, replace=False):
        element, key = numbers[k]
        before = element.get(key)
        element.set(key, str(float(before) * 1.001 + 0.001))
        assert openmm_digest(ElementTree.tostring(root, encoding="unicode")) != digest, (element.tag, key)
        element.set(key, before)


def test_a_reference_is_of_the_dihedral_that_was_simulated():
    require_reference(aldp(), "umbrella")
    require_reference(aldp(), "metadynamics", "psi")  # which weighs its frames for any state
    stateless = copy.copy(aldp())
    stateless.state = None
    for system, sampling, dihedral, words in (
        (aldp(), "langevin", None, "set sampling to umbrella or metadynamics"),
        (bz.load_system("double_well"), "metadynamics", None, "has an exact reference"),
        (aldp(), "umbrella", "psi", "state is one of phi, and the simulation along psi"),
        (stateless, "umbrella", "phi", "aldp has none: set system.state"),
    ):
        with pytest.raises(bz.UserError, match=words):
            require_reference(system, sampling, dihedral)


# ---- runs ------------------------------------------------------------------------------------------------------------


def test_a_run_keeps_its_structure_and_its_force_field(tmp_path, monkeypatch):
    """Given by relative paths, it is the same molecule from elsewhere, after a move, and without the originals."""
    there, elsewhere = tmp_path / "there", tmp_path / "elsewhere"
    for folder in (there, elsewhere):
        folder.mkdir()
    os.replace(mirrored(tmp_path), there / "m.pdb")
    shutil.copy(STRUCTURES / "aldp.pdb", elsewhere / "m.pdb")  # L, by the same name
    for name in ("amber96.xml", "amber96_obc.xml"):
        shutil.copy(AMBER / name, there / f"my_{name}")
    (there / "mine.xml").write_text('<ForceField><Include file="my_amber96.xml"/></ForceField>')
    monkeypatch.chdir(there)
    files = {"structure": "m.pdb", "forcefield": ["mine.xml", "my_amber96_obc.xml"]}
    target = {"_target_": "boltznce.systems.molecular.MolecularSystem", "name": "aldp", "temperature": 300.0}
    config = OmegaConf.create({"system": target | files, "data_dir": "data"})
    run = RunFolder.create(tmp_path / "run", config, "aldp")
    system = build(run.config.system)
    run.record_identity(system)
    run.mark_done("hot")
    RunFolder.create(run.path, config, "aldp")
    (there / "m.pdb").write_text((elsewhere / "m.pdb").read_text())
    with pytest.raises(bz.UserError, match=r"the contents of .*m\.pdb"):
        RunFolder.create(run.path, config, "aldp")
    shutil.rmtree(there)
    monkeypatch.chdir(elsewhere)
    opened = RunFolder.open(shutil.move(run.path, tmp_path / "moved"), trust=True)  # it has a force field of its own
    again = build(opened.config.system)
    assert again.identity == system.identity
    assert (system.identity["handedness"], aldp().identity["handedness"]) == ("+", "-")
    assert opened.config.data_dir == str(there / "data")
    opened.check_identity(again)
    charges = opened.path / "inputs" / "system.forcefield.0" / "my_amber96.xml"
    charges.write_text(charges.read_text().replace('charge="0.', 'charge="1.'))
    with pytest.raises(bz.UserError, match="no longer gives the system of the run: other parameters"):
        opened.check_identity(build(opened.config.system))


def test_weights_to_begin_with_are_the_run_s_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "flow.safetensors").write_bytes(b"weights")
    config = OmegaConf.create({"flow": {"start": "flow.safetensors"}, "data": {"folder": "data"}})
    run = RunFolder.create(tmp_path / "run", config, "aldp")
    (tmp_path / "flow.safetensors").unlink()
    assert Path(run.config.flow.start).read_bytes() == b"weights"
    assert Path(run.config.flow.start).is_relative_to(tmp_path / "run")
    assert run.config.data.folder == str(tmp_path / "data")


def test_a_run_whose_data_were_changed_meanwhile(tmp_path):
    well = OmegaConf.load(config_dir() / "system" / "double_well.yaml")
    well.pop("defaults")
    config = OmegaConf.create({"system": well, "data": {"folder": str(tmp_path / "set")}})
    run = RunFolder.create(tmp_path / "run", config, "double_well")
    work = Workspace(run, run.config, fabric=None)
    data = write_data(tmp_path / "set", work.system)
    run.mark_done("data", {"datasets": {"double_well": data.digest}})
    assert len(work.frames(work.system)) == 40
    write_data(tmp_path / "set", work.system, n=50)
    with pytest.raises(bz.UserError, match="no longer holds the data of double_well that"):
        work.frames(work.system)


# ---- in words --------------------------------------------------------------------------------------------------------


def test_where_numbers_come_from_in_words(tmp_path):
    assert energy_in_words(aldp().identity) == "amber99sbildn.xml + amber99_obc.xml + NoCutoff"
    cut = {"nonbonded": "CutoffNonPeriodic", "cutoff_nm": 0.5}
    assert energy_in_words(aldp().identity | cut) == "amber99sbildn.xml + amber99_obc.xml + CutoffNonPeriodic 0.5 nm"
    well = bz.load_system("double_well")
    assert energy_in_words(well.identity) == "DoubleWell, barrier 5, tilt 0.5, stiffness 4"
    data = make_data(well, tmp_path, simulation=None, n_samples=50)["double_well"]
    assert data_in_words(data.meta).startswith("exact, seed 0, 50 frames, 20")
    assert data_in_words({"n_frames": 3}) == "made in a way not recorded, 3 frames"
    assert "well-tempered metadynamics" in reference_in_words(aldp())
    assert reference_in_words(aldp().at_temperature(310.0)) == "none"
    assert reference_in_words(well) == "exact, on a grid"
