"""Folders and files from others: nothing in them is executed, and nothing outside of a run's folder is written.

Each hostile folder is the same small run with one thing changed, opened, drawn from, finished. A payload would leave
the file ``sentinel``; ``victim`` is a folder of the user's with something in it.
"""

import json
import os
import pickle
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from omegaconf import OmegaConf

import boltznce as bz
from boltznce import cli, config
from boltznce.analysis.reweighting import WeightedSamples
from boltznce.checkpoint import Checkpoints, save_weights
from boltznce.errors import UserError
from boltznce.io import file_digest
from boltznce.methods.models import make, weights_path
from boltznce.records import read_json, read_yaml, sealed
from boltznce.run import RunFolder, start_folder, train
from boltznce.trust import check_trusted

FEW = ["system=gaussians8", "budget=smoke", "threads=1", "flow.solver.steps=2", "data.n_samples=50"]
EVIL = """
import pathlib
pathlib.Path({sentinel!r}).touch()
from torch import nn
STAGES = {{}}
class Net(nn.Module):
    def __init__(self, dim):
        super().__init__()
"""
XML = "<ForceField><AtomTypes/><Residues/>{more}</ForceField>"
WRITE = "open({sentinel!r}, 'w')"


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    """A run whose flow has got no training, and that has not come further."""
    folder = tmp_path_factory.mktemp("small") / "run"
    settings = config.compose("train", [*FEW, f"data.folder={folder.parent / 'data'}"])
    run = start_folder(folder, settings)
    flow = make(settings, config.build(settings.system), "flow")
    save_weights(weights_path(folder, "flow"), flow.state_dict(), {"start": None, "published": None})
    run.mark_done("flow", {"steps": 0})
    return folder


@pytest.fixture
def place(small_run, tmp_path, monkeypatch):
    """A copy of the run as a download is, and what must not happen."""
    for name in ("victim", "elsewhere"):
        (tmp_path / name).mkdir()
    (tmp_path / "victim" / "thesis.txt").write_text("years of work")
    shutil.copytree(small_run, tmp_path / "run")
    (tmp_path / "evil.py").write_text(EVIL.format(sentinel=str(tmp_path / "sentinel")))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path / "elsewhere")
    OmegaConf.register_new_resolver("payload", lambda: (tmp_path / "sentinel").touch(), replace=True)
    yield SimpleNamespace(
        run=tmp_path / "run", top=tmp_path, victim=tmp_path / "victim", sentinel=tmp_path / "sentinel"
    )
    sys.modules.pop("evil", None)
    OmegaConf.clear_resolver("payload")


def set_config(place, key: str, value) -> None:
    path = place.run / "config.yaml"
    settings = OmegaConf.create(read_yaml(path, ""))
    OmegaConf.update(settings, key, value, merge=False, force_add=True)
    path.write_text(yaml.safe_dump(sealed(OmegaConf.to_container(settings))))


def use(place) -> list[Exception]:
    """Open the run, look at it, draw from it, go on with it; what was raised."""
    raised = []
    for action in (
        lambda: bz.load_run(place.run).sample(2),
        lambda: repr(bz.load_run(place.run).system),
        lambda: train(RunFolder.open(place.run)),
    ):
        try:
            action()
        except Exception as error:
            raised.append(error)
    return raised


def everything(top: Path) -> dict[str, str]:
    return {
        str(path.relative_to(top)): path.read_text(errors="replace") if path.is_file() else ""
        for path in sorted(top.rglob("*"))
        if "__pycache__" not in path.parts and "run" not in path.relative_to(top).parts[:1]
    }


TARGETS = [
    ("system", {"_target_": "subprocess.getoutput", "cmd": "touch {sentinel}", "name": "x"}),
    ("system._target_", "evil.System"),
    ("flow.network", {"_target_": "os.system", "command": "touch {sentinel}"}),
    ("flow.network._target_", "evil.Net"),
    ("ebm.network._target_", "builtins.exec"),
    ("method._target_", "evil"),
    ("method._target_", "boltznce.run"),
    ("method._target_", "boltznce.config.importlib"),
    ("flow.model.deep", [{"_target_": "evil.Net"}]),
    ("system.std", "${{payload:}}"),
    ("system.std", "${{oc.decode:${{oc.env:HOME}}}}"),
    ("system.std", "${{seed}}"),
    ("system.name", "../../victim"),
    ("system.name", "{victim}"),
    ("system.name", ""),
    ("system.name", ".."),
    ("data.folder", "{victim}"),
    ("data.folder", "{top}/new"),
    ("data.folder", "../victim/deeper"),
]


@pytest.mark.parametrize(("key", "value"), TARGETS, ids=lambda value: str(value)[:40])
def test_what_a_config_may_not_say(place, key, value):
    def filled(value):
        if isinstance(value, dict):
            return {name: filled(each) for name, each in value.items()}
        if isinstance(value, list):
            return [filled(each) for each in value]
        return value.format(sentinel=place.sentinel, victim=place.victim, top=place.top)

    set_config(place, key, filled(value))
    before, raised = everything(place.top), use(place)
    assert everything(place.top) == before
    assert "evil" not in sys.modules
    assert raised
    assert all(isinstance(error, UserError) and "\n" not in str(error) for error in raised), raised


BOMB = "a: &a [1,1,1,1,1,1,1,1,1,1]\n" + "".join(
    f"{chr(98 + k)}: &{chr(98 + k)} [{','.join([f'*{chr(97 + k)}'] * 10)}]\n" for k in range(9)
)


@pytest.mark.parametrize(
    "text",
    [
        "!!python/object/apply:os.system ['touch {sentinel}']\n",
        "method: !!python/name:evil.Net\n",
        BOMB,
        "[" * 1500,
        "a: &a [*a]\n",
    ],
    ids=["apply", "name", "bomb", "nesting", "circle"],
)
def test_yaml_that_is_more_than_settings(place, text):
    (place.run / "config.yaml").write_text(text.replace("{sentinel}", str(place.sentinel)))
    before, raised = everything(place.top), use(place)
    assert everything(place.top) == before
    assert all(isinstance(error, UserError) for error in raised), raised
    assert len(raised) == 3


@pytest.mark.parametrize("name", ["checkpoints", "samples", ".hydra", "train.log", "figures"])
def test_links_out_of_the_folder(place, name, monkeypatch, capfd):
    target = place.victim / "thesis.txt" if name == "train.log" else place.victim
    if (place.run / name).exists():
        shutil.rmtree(place.run / name)
    (place.run / name).symlink_to(target)
    before, raised = everything(place.top), use(place)
    monkeypatch.setattr("sys.argv", ["train.py", f"resume={place.run}"])
    with pytest.raises(SystemExit) as ended:
        cli.launch("train", lambda composed: None)
    assert ended.value.code == 2
    assert "leads out of a run" in capfd.readouterr().err
    assert everything(place.top) == before
    assert len(raised) == 3
    assert all(isinstance(error, UserError) for error in raised), raised


def test_a_record_that_names_files_of_others(place):
    record = read_json(place.run / "run.json", "")
    record["stages"]["flow"]["leaves"] = {"gone.json": "0"}
    for stage, leaf in {"samples": "../victim/thesis.txt", "ebm": str(place.victim), "report": "../victim"}.items():
        record["stages"][stage] = {"seconds": 1, "peak_memory": 1, "finished": "x", "leaves": {leaf: "0"}}
    (place.run / "run.json").write_text(json.dumps(sealed(record)))
    before = everything(place.top)
    use(place)
    run = RunFolder.open(place.run)
    with run.stage("flow"):
        pass
    run.mark_done("flow")
    assert "report" not in run.stages or not run.stage_done("report")
    assert everything(place.top) == before


class Payload:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_pickles_in_checkpoints_and_arrays(place):
    checkpoints = Checkpoints(place.run / "checkpoints" / "flow", keep=1)
    checkpoints.save(1, {"model": {"w": torch.zeros(2)}}, {})
    step = checkpoints.folder / "step_0000001"
    torch.save(Payload(place.sentinel), step / "state.pt")
    digests = {path.name: file_digest(path) for path in step.iterdir() if path.name != "digests.json"}
    (step / "digests.json").write_text(json.dumps(digests))
    with pytest.raises(UserError, match="damaged"):
        checkpoints.newest()

    rng = np.random.default_rng(0)
    WeightedSamples(rng.normal(size=(3, 1, 2)).astype("f4"), rng.normal(size=3), rng.normal(size=3)).save(
        place.top / "samples"
    )
    path, contents = place.top / "samples" / "energy.npy", read_yaml(place.top / "samples" / "meta.yaml", "")
    np.save(path, np.array([Payload(place.sentinel)] * 3, dtype=object), allow_pickle=True)
    contents["digests"]["energy.npy"] = file_digest(path)
    (place.top / "samples" / "meta.yaml").write_text(yaml.safe_dump(sealed(contents)))
    with pytest.raises(UserError, match="not an array file"):
        WeightedSamples.load(place.top / "samples")
    with open(path, "wb") as handle:  # a header that asks for petabytes
        np.lib.format.write_array_header_1_0(handle, {"descr": "<f8", "fortran_order": False, "shape": (10**15,)})
    with pytest.raises(UserError, match="truncated"):
        WeightedSamples.load(place.top / "samples")
    path.unlink()
    os.mkfifo(path)  # to open it would wait for ever
    with pytest.raises(UserError, match="missing"):
        WeightedSamples.load(place.top / "samples")
    assert not place.sentinel.exists()
    assert pickle.loads(pickle.dumps(Payload(place.sentinel))) is None
    assert place.sentinel.exists()  # it would have worked


SCRIPTS = {
    "script": "<Script>{write}</Script>",
    "initialization": "<InitializationScript>{write}</InitializationScript>",
    "evaluated": '<NonbondedForce coulomb14scale="1" lj14scale="1" useDispersionCorrection="{write}"/>',
    "included": '<Include file="other.xml"/>',
}


@pytest.mark.parametrize("kind", SCRIPTS)
def test_force_fields_that_run_python(place, kind):
    write = WRITE.format(sentinel=str(place.sentinel))
    (place.run / "other.xml").write_text(XML.format(more=SCRIPTS["script"].format(write=write)))
    (place.run / "mine.xml").write_text(XML.format(more=SCRIPTS[kind].format(write=write)))
    settings = yaml.safe_load((config.config_dir() / "system" / "aldp.yaml").read_text())
    settings["forcefield"].append(str(place.run / "mine.xml"))
    (place.top / "mine.yaml").write_text(yaml.safe_dump(settings))
    set_config(place, "system", settings)
    for refused in (
        lambda: bz.load_system(place.top / "mine.yaml"),
        lambda: bz.load_run(place.run),
        lambda: config.compose("train", [f"system={place.top / 'mine.yaml'}"]),
    ):
        with pytest.raises(UserError, match="runs scripts"):
            refused()
    assert not place.sentinel.exists()


def test_a_force_field_of_openmm_is_not_taken_from_here(place):
    """One of the same name in the working directory, which may be the download, does not stand in for it."""
    write = WRITE.format(sentinel=str(place.sentinel))
    Path("amber99sbildn.xml").write_text(XML.format(more=SCRIPTS["script"].format(write=write)))
    assert bz.load_system("aldp").n_atoms == 22
    assert not place.sentinel.exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"_target_": "subprocess.getoutput"},
        {"_target_": "evil.System"},
        {"std": "${payload:}"},
        {"defaults": [{"override /hydra/job_logging": "none"}]},
        {"name": "../x"},
    ],
    ids=str,
)
def test_files_of_systems(place, changes):
    settings = yaml.safe_load((config.config_dir() / "system" / "gaussians8.yaml").read_text())
    path = place.top / "given.yaml"
    path.write_text(yaml.safe_dump(settings))
    assert bz.load_system(path).name == "gaussians8"
    path.write_text(yaml.safe_dump(settings | changes))
    before = everything(place.top)
    with pytest.raises(UserError):
        bz.load_system(path)
    with pytest.raises(UserError):
        config.build(config.compose("train", [f"system={path}"]).system)
    assert everything(place.top) == before
    assert "evil" not in sys.modules


# ---- what is trusted ------------------------------------------------------------------------------------------------


def test_a_network_of_the_users_own(place):
    set_config(place, "flow.network", {"_target_": "mine.Net"})
    (place.top / "mine.py").write_text(EVIL.format(sentinel=str(place.top / "imported")))
    with pytest.raises(UserError, match=r"mine\.Net.*boltznce\.register.*trust=true"):
        bz.load_run(place.run)
    assert not (place.top / "imported").exists()
    run = bz.load_run(place.run, trust=True)
    assert config.locate(run.config.flow.network._target_, torch.nn.Module).__name__ == "Net"

    @bz.register
    class Mine(torch.nn.Module):
        pass

    path = f"{Mine.__module__}.{Mine.__qualname__}"
    check_trusted({"network": {"_target_": path}}, "here")
    assert config.locate(path, torch.nn.Module) is Mine  # as it is, though no import would find it


def test_a_run_started_here_writes_its_data_where_it_was_told(small_run, place):
    """Resumed after a kill in its first stage; a copy of it asks first."""
    own, copy = RunFolder.open(small_run), RunFolder.open(place.run)
    assert not own.foreign
    own.check_writes(place.top / "data")
    assert copy.foreign
    with pytest.raises(UserError, match="not started here"):
        copy.check_writes(place.top / "data")
    copy.check_writes(place.run / "data")
    assert not RunFolder.open(place.run, trust=True).foreign


@pytest.mark.parametrize("device", ["/dev/zero", "pipe"])
def test_structures_that_are_no_files(tmp_path, device):
    if device == "pipe":
        device = str(tmp_path / "pipe")
        os.mkfifo(device)
    with pytest.raises(UserError, match="no structure file"):
        bz.load_system("aldp", structure=device)
