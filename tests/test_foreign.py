"""Files of others: a folder that has any is refused before any work, and nothing in it changes."""

import numpy as np
import pytest
from forks import TABG
from omegaconf import OmegaConf

from boltznce import WeightedSamples, train_run
from boltznce.analysis.samples_io import SAMPLES, WeightedSamplesWriter
from boltznce.checkpoint import Checkpoints
from boltznce.cli import _prepared
from boltznce.config import compose, load_system
from boltznce.data.dataset import DATASET, Dataset
from boltznce.data.members import make_data, simulate_members
from boltznce.data.reference import check_reference_place
from boltznce.errors import UserError
from boltznce.folders import claim, inside
from boltznce.methods.free_energy import write_free_energy
from boltznce.run_folder import RunFolder

SIMULATION = {"duration": 2.0, "n_repeats": 1}


def samples():
    return WeightedSamples(np.zeros((5, 1, 2), "f4"), *(np.arange(5.0) for _ in range(3)))


def dataset(folder):
    return Dataset.write(folder, np.zeros((10, 1, 2)), np.zeros(10))


def benchmark(folder):
    from boltznce.benchmarks.run import run_benchmark

    return run_benchmark(compose("benchmark", [f"output={folder}"]))


def free_energy(folder):
    write_free_energy(load_system("double_well"), folder / "none", folder)


WRITERS = {
    "samples": lambda folder: samples().save(folder),
    "writer": WeightedSamplesWriter,
    "dataset": dataset,
    "exact data": lambda folder: make_data(load_system("gaussians8"), folder, simulation=None, n_samples=10),
    "data": lambda folder: make_data(load_system("aldp"), folder, simulation=SIMULATION),
    "simulation": lambda folder: simulate_members(load_system("aldp"), folder, **SIMULATION),
    "run": lambda folder: RunFolder.create(folder, OmegaConf.create({}), "aldp"),
    "train_run": lambda folder: train_run(folder, *TABG),
    "hydra.run.dir": lambda folder: _prepared("train", ["system=gaussians8", f"hydra.run.dir={folder}"]),
    "hydra.sweep.dir": lambda folder: _prepared("train", ["-m", f"hydra.sweep.dir={folder}"]),
    "free energy": free_energy,
    "benchmark": benchmark,
    "reference": lambda folder: check_reference_place(folder / "report.md", "aldp"),
    "checkpoint": lambda folder: Checkpoints(folder.parent, 2).save(7, {}, {}),
}
CONTENTS = {
    "report": {"report.md": "mine", "figures/profile.png": "mine", "metrics.json": "{}"},
    "markers of others": {"meta.yaml": "a: 1", "run.json": "[1]", "report.md": "", "profile.json": "{}", "x.npy": ""},
}


@pytest.mark.parametrize("contents", CONTENTS)
@pytest.mark.parametrize("kind", WRITERS)
def test_files_of_others_are_refused_and_stay(tmp_path, kind, contents):
    folder = tmp_path / "step_0000007"
    for name, text in CONTENTS[contents].items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    before = contents_of(tmp_path)
    with pytest.raises(UserError) as error:
        WRITERS[kind](folder)
    assert str(folder) in str(error.value)
    assert contents_of(tmp_path) == before


def contents_of(folder):
    return {path: path.read_text() if path.is_file() else None for path in folder.rglob("*")}


def test_a_note_in_samples_of_ours_is_not_deleted_and_ours_are_replaced(tmp_path):
    samples().save(tmp_path / "out")
    samples()[:3].save(tmp_path / "out")
    assert len(WeightedSamples.load(tmp_path / "out")) == 3
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"notes\.txt"):
        samples().save(tmp_path / "out")
    with pytest.raises(UserError, match=r"is a file"):
        claim(tmp_path / "out" / "notes.txt", SAMPLES)
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"
    (tmp_path / ".new.partial").mkdir()
    (tmp_path / ".new.partial" / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match=r"thesis\.tex"):
        samples().save(tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".new.partial", "out"]


@pytest.mark.parametrize("name", ["", ".", "..", "../..", "a/../..", "/tmp"])
def test_names_that_lead_elsewhere(tmp_path, name):
    with pytest.raises(UserError, match="names no folder"):
        inside(tmp_path, name, "name")
    assert inside(tmp_path, "a/b", "name") == tmp_path / "a" / "b"


@pytest.mark.parametrize("text", ["[" * 5000, "digests: [1]\nn_frames: 1", "digests: 7\nn_frames: 1", "{", "", "- 1"])
def test_a_marker_of_any_contents_makes_no_folder_ours(tmp_path, text):
    (tmp_path / "meta.yaml").write_text(text)
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match=f"{tmp_path} has files"):
        claim(tmp_path, DATASET)
