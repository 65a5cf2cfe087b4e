"""Reference data: independent repeats of a simulation, one process each, gathered into a dataset."""

import dataclasses
import os
import platform as machine
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from boltznce.data import metadynamics
from boltznce.data.dataset import DATASET, Dataset, in_order
from boltznce.data.engine import (
    Job,
    check_frames,
    frame_dtype,
    picoseconds_done,
    read_frames,
    seconds_spent,
)
from boltznce.data.jobs import jobs_of
from boltznce.data.matching import made_here, require_settings, require_system
from boltznce.data.mbar import MBAR_MAX_FRAMES
from boltznce.data.replica_exchange import temperature_ladder
from boltznce.data.umbrella import ring_of
from boltznce.errors import UserError
from boltznce.folders import Kind, claim, discard, only_process
from boltznce.io import require_free_space
from boltznce.settings import require, require_keywords
from boltznce.systems.workers import available_cores
from boltznce.topologies import system_pdb

__all__ = [
    "Plan",
    "gather",
    "plan",
    "run_plans",
    "simulate",
    "working_folder",
]

UNFINISHED = Kind("an unfinished simulation", names=r"repeat_\d+", whole=True)
RECORDED = {  # the option that says how many frames are kept at a time
    "umbrella": "n_windows",
    "replica_exchange": "n_ladders",
    "langevin": "n_walkers",
    "metadynamics": "n_walkers",
}
ONE_PROCESS = {
    "OMP_NUM_THREADS": "1",
    "TORCHINDUCTOR_COMPILE_THREADS": "1",
    "PYTHONIOENCODING": "utf-8",
}  # a worker starts no others


def simulate(
    system,
    folder: Path,
    method: str = "auto",
    *,
    n_processes: int | None = None,
    progress: bool = True,
    **settings,
) -> Dataset:
    """Simulate a molecule and write a dataset to ``folder``; go on where a killed call with these settings stopped.

    ``settings`` are those of `plan`; ``n_processes`` repeats run at a time (default: one a core).

    Raises UserError as `plan` does, for an unstable simulation and for a full disk.
    """
    require(n_processes=n_processes)
    with only_process(folder, beside=True, wait=True):
        work = plan(system, folder, method, **settings)
        run_plans([work], n_processes, f"simulation of {system.name}", progress)
        return work.finish()


@dataclasses.dataclass(frozen=True)
class Plan:
    """A simulation to be run or gone on with, its jobs on disk; or one whose dataset is there, without jobs."""

    system: Any
    folder: Path
    jobs: list[Job]
    job_folders: list[Path]

    def finish(self) -> Dataset:
        """The dataset; written now if all jobs have just ended."""
        if not self.jobs:
            dataset = Dataset.load(self.folder)
            require_system(self.folder, dataset, self.system)
            return dataset
        if not (self.folder / "meta.yaml").exists():
            gather(self.system, self.job_folders, self.folder)
            discard(working_folder(self.folder), UNFINISHED)
        return Dataset.load(self.folder)


def plan(system, folder: Path, method: str = "auto", **settings: Any) -> Plan:
    """Write the jobs of a simulation beside ``folder``, if its dataset is not there yet.

    ``settings`` are those of `jobs_of`. Raises UserError as that does, for another simulation in the folder (see
    `boltznce.data.matching`) and for a full disk.
    """
    require_keywords(jobs_of, settings, "a simulation")
    system = system.cheap
    folder, jobs = Path(folder), jobs_of(system, method, **settings)
    job = jobs[0]
    if (folder / "meta.yaml").exists():
        recorded = Dataset.read_meta(folder).get("settings") or {}
        if not made_here(recorded):
            raise UserError(f"{folder} holds data that no simulation of this library has made: choose another name.")
        require_settings(folder, recorded, job.settings(len(jobs)))
        discard(working_folder(folder), UNFINISHED)  # a kill came before it was gone
        return Plan(system, folder, [], [])

    claim(folder, DATASET, "another name, or data.folder")
    claim(working_folder(folder), UNFINISHED, "another name, or data.folder")
    n_frames = len(jobs) * job.options.get(RECORDED[job.method], 1) * round(job.duration / job.frame_interval)
    require_free_space(folder, 2 * n_frames * frame_dtype(system.n_atoms).itemsize)
    folders = [working_folder(folder) / f"repeat_{job.repeat}" for job in jobs]
    start = np.zeros((system.n_atoms, 3))
    start[:, : system.dim] = system.positions
    for job, path in zip(jobs, folders, strict=True):
        job.save(path, system if system.exact else system.openmm_system(), start)
    return Plan(system, folder, jobs, folders)


def run_plans(
    plans: Sequence[Plan], n_processes: int | None = None, title: str = "simulations", progress: bool = True
) -> None:
    """Run the jobs of all plans, one process each, ``n_processes`` at a time (default: one a core)."""
    require(n_processes=n_processes)
    jobs = [job for each in plans for job in each.jobs]
    folders = [path for each in plans for path in each.job_folders]
    _run(jobs, folders, n_processes or available_cores(), title, progress)


def working_folder(folder: Path) -> Path:
    """Where the unfinished simulation of the dataset ``folder`` lives."""
    return Path(folder).with_name(f"{Path(folder).name}.unfinished")


def gather(system, folders: list[Path], output: Path) -> Dataset:
    """Make a dataset of the frames of the jobs in ``folders``, up to the time that all have reached."""
    jobs = [Job.load(path) for path in folders]
    for path in folders:
        check_frames(path)
    frames = [read_frames(path) for path in folders]
    end = min(f["time"][-1] for f in frames)
    frames = [f[: np.searchsorted(f["time"], end, side="right")] for f in frames]
    repeat = np.repeat([job.repeat for job in jobs], [len(f) for f in frames])
    columns = {name: np.concatenate([f[name] for f in frames]) for name in ("energy", "dihedral", "window", "time")}
    log_weights = np.zeros(len(repeat))
    extra: dict[str, Any] = {}
    if jobs[0].method == "umbrella":
        angle, window = columns["dihedral"], columns["window"]
        ring = ring_of(jobs[0].options, jobs[0].temperature, angle)
        thin = np.random.default_rng(jobs[0].seed).permutation(len(angle))[:MBAR_MAX_FRAMES]
        log_weights = ring.log_weights(angle, window, ring.free_energies(angle[thin], window[thin]))
        extra["cut"] = ring.cut
    elif jobs[0].method == "metadynamics":
        weighed = [metadynamics.weigh(*each) for each in zip(jobs, folders, frames, strict=True)]
        log_weights = np.concatenate([log_w for log_w, _ in weighed])
        extra["bias_change"] = [round(change, 4) for _, change in weighed]
    elif jobs[0].method == "replica_exchange":
        options = jobs[0].options
        extra["ladder"] = [
            float(t) for t in temperature_ladder(jobs[0].temperature, options["max_temperature"], options["n_replicas"])
        ]
    order = np.argsort(columns["time"], kind="stable")
    return Dataset.write(
        output,
        (chunk[..., : system.dim] for chunk in in_order([f["positions"] for f in frames], order)),
        columns["energy"][order],
        log_weights=log_weights[order],
        time=columns["time"][order],
        window=columns["window"][order],
        repeat=repeat[order],
        topology=None if system.exact else system_pdb(system),
        meta={
            "system": system.identity,
            "settings": jobs[0].settings(len(jobs)),
            "engine": jobs[0].engine,
            "ps_per_walker": float(end),
            "cpu_seconds": round(sum(seconds_spent(path) for path in folders), 2),
            **extra,
            "versions": {name: version(name) for name in ("openmm", "torch", "pymbar", "numpy")},
            "date": date.today().isoformat(),
            "machine": _machine(jobs[0].engine),
        },
    )


def _machine(engine: str) -> str:
    if engine == "torch" and torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{machine.system()} {machine.machine()}, {os.cpu_count()} cores"


def _run(jobs: list[Job], folders: list[Path], n_processes: int, title: str, progress: bool) -> None:
    """Run every job in a process of its own, ``n_processes`` at a time; a failure or an interrupt ends them all."""
    waiting = list(folders)  # a finished job ends at once
    running: dict[Path, subprocess.Popen] = {}
    try:
        with tqdm(
            total=sum(job.total for job in jobs), desc=title, unit="ps", disable=not progress, mininterval=1.0
        ) as bar:
            while waiting or running:
                while waiting and len(running) < n_processes:
                    path = waiting.pop(0)
                    running[path] = _start(path)
                time.sleep(0.1)
                for path, process in list(running.items()):
                    if process.poll() is not None:
                        del running[path]
                        _raise_for(process.returncode, path)
                bar.update(sum(picoseconds_done(path) for path in folders) - bar.n)
            bar.update(bar.total - bar.n)
    finally:
        for process in running.values():
            process.kill()
            process.wait()


def _start(folder: Path) -> subprocess.Popen:
    environment = {**os.environ, **ONE_PROCESS, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-m", "boltznce.data.worker", str(folder), str(os.getpid())]
    with open(folder / "log", "w", encoding="utf-8") as log:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment)


def _raise_for(status: int, folder: Path) -> None:
    if status == 0:
        return
    message = (folder / "log").read_text(errors="replace", encoding="utf-8").strip()
    if status == 2 and message:
        raise UserError(message.splitlines()[-1])
    raise RuntimeError(f"{folder} ended with status {status}; run again to go on. Its log:\n{message[-2000:]}")
