"""Full, read-only and vanished disks: one sentence, status 2, nothing half-written, and one can go on."""

import errno
import os
import shutil
import subprocess
import time

import numpy as np
import pytest
import torch
from forks import SIMULATION, TABG, leftovers
from matplotlib.figure import Figure
from omegaconf import OmegaConf
from safetensors import SafetensorError

from boltznce import WeightedSamples
from boltznce.analysis.report import write_report
from boltznce.checkpoint import Checkpoints, save_weights
from boltznce.data.dataset import Dataset
from boltznce.errors import UserError
from boltznce.io import atomic_file, atomic_folder, disk_errors_told
from boltznce.logger import CSVLog
from boltznce.run_folder import RunFolder

X = np.zeros((2000, 1, 2), "f4")
BIG = {"a": torch.zeros(20000)}


def samples(folder):
    WeightedSamples(X, *(np.zeros(2000) for _ in range(3))).save(folder)


def table(folder):
    log = CSVLog(folder.with_suffix(".csv"))
    for step in range(3000):
        log.append({"step": step})


WRITERS = {
    "weights": lambda folder: save_weights(folder / "a.safetensors", BIG),
    "checkpoint": lambda folder: Checkpoints(folder, 2).save(1, {}, BIG),
    "samples": samples,
    "dataset": lambda folder: Dataset.write(folder, X, np.zeros(2000)),
    "table": table,
    "figure": lambda folder: write_report(folder, {}, {"x": Figure()}),
    "run": lambda folder: RunFolder.create(folder, OmegaConf.create({"a": "b" * 9000}), "aldp"),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_is_told_by_every_writer(tmp_path, name):
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, before[1]))
    try:
        with pytest.raises(UserError, match=f"while writing {tmp_path}"):
            WRITERS[name](tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path for path in leftovers(tmp_path) if ".tmp" in path] == []
    WRITERS[name](tmp_path / ("out" if name != "table" else "again"))


@pytest.mark.parametrize("number", ["ENOSPC", "EDQUOT", "EROFS", "EACCES", "ENOENT", "EIO", "EFBIG"])
def test_every_error_of_a_disk_is_told(tmp_path, monkeypatch, number):
    number = getattr(errno, number)

    def fail(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "replace", fail)
    for write in (lambda: save_weights(tmp_path / "a", BIG), lambda: Dataset.write(tmp_path / "d", X, np.zeros(2000))):
        with pytest.raises(UserError, match="while writing"):
            write()
    with pytest.raises(UserError, match="while writing"), disk_errors_told(tmp_path):
        raise SafetensorError(f"Error while serializing: I/O error: {os.strerror(number)} (os error {number})")
    assert list(tmp_path.iterdir()) == []


def test_other_errors_are_not_those_of_a_disk(tmp_path):
    for error in (RuntimeError("shapes do not fit"), ConnectionResetError(errno.ECONNRESET, "reset")):
        with pytest.raises(type(error)), disk_errors_told(tmp_path):
            raise error


def test_what_killed_processes_leave_goes_at_the_next_write(tmp_path):
    dead = subprocess.Popen(["true"])
    dead.wait()
    for name in (f".a.png.{dead.pid}.tmp", f".a.png.{os.getppid()}.tmp", f".other.{dead.pid}.tmp", ".a.png.tmp"):
        (tmp_path / name).write_text("")
    (tmp_path / f".d.{dead.pid}.old").mkdir()
    with atomic_file(tmp_path / "a.png") as path:
        path.write_text("whole")
    with atomic_folder(tmp_path / "d", lambda: None) as path:
        (path / "x").write_text("whole")
    expected = {".a.png.tmp", f".a.png.{os.getppid()}.tmp", f".other.{dead.pid}.tmp", "a.png", "d"}
    assert {path.name for path in tmp_path.iterdir()} == expected
    assert (tmp_path / "d" / "x").exists()


# ---- scripts --------------------------------------------------------------------------------------------------------


def told(child):
    assert child.status == 2, child.output[-2000:]
    assert len(child.told) == 1, child.output[-2000:]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_scripts_on_full_disks(forks, tmp_path):
    """No file may grow beyond a limit, at which the write fails as on a full disk; then one goes on."""
    wanted = [("train", [*TABG, "hydra.run.dir=run"], 4000 * np.array([2, 3, 4, 6, 8, 10, 14, 20, 30]))]
    wanted += [("sample", ["run=run", "n_samples=4000", "batch_size=200"], 4000 * np.array([1, 2, 4, 7]))]
    wanted += [("free_energy", ["run=run", "n_bootstrap=20"], [2000, 4000, 8000, 20000])]
    wanted += [("simulate", SIMULATION, [8000, 20000, 100000])]
    full = 0
    for script, arguments, limits in wanted:
        for limit in limits:
            begun = script == "train" and (tmp_path / "run" / "config.yaml").exists()
            child = forks.run(script, *(["resume=run"] if begun else arguments), cwd=tmp_path, limit=int(limit))
            if child.status:
                told(child)
                full += 1
        begun = script == "train" and (tmp_path / "run" / "config.yaml").exists()
        child = forks.run(script, *(["resume=run"] if begun else arguments), cwd=tmp_path)
        assert child.status == 0 or "holds samples already" in child.output, child.output[-2000:]
        assert leftovers(tmp_path) == []
    print(f"{full} full disks")
    assert full >= 10


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_scripts_on_read_only_and_full_mounts(forks, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("nothing can be mounted here")
    try:
        full = forks.run("train", *TABG, "hydra.run.dir=disk/run", cwd=tmp_path)
        told(full)
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        for script, arguments in (
            ("train", [*TABG, "hydra.run.dir=disk/other"]),
            ("train", ["resume=disk/run"]),
            ("simulate", [*SIMULATION, "data_dir=disk"]),
            ("sample", ["run=disk/run", "n_samples=10"]),
        ):
            told(forks.run(script, *arguments, cwd=tmp_path))
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_folders_that_vanish(forks, tmp_path):
    for stage in ("hot", "annealing"):
        child = forks.start("train", *TABG, "hot.fit.steps=3000", "hydra.run.dir=run", cwd=tmp_path)
        log = tmp_path / "run" / f"{'hot' if stage == 'hot' else 'anneal_00'}.csv"
        while child.poll() is None and not log.exists():
            time.sleep(0.01)
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        child.wait()
        told(child)
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
