"""The folder of a run: its resolved config, and a record of the stages that are done, what they left and cost."""

import contextlib
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from boltznce.checkpoint import weights_digest
from boltznce.clock import cpu_seconds
from boltznce.command_line import command_line
from boltznce.errors import UserError, first_few
from boltznce.folders import Kind, claim, only_process
from boltznce.io import RUN_FORMAT, atomic_file, check_format, file_digest
from boltznce.pretrained import is_shipped, located, outputs_of, shown
from boltznce.records import as_dict, damaged, read_json, read_settings, read_yaml, sealed
from boltznce.run_inputs import (
    changed_settings,
    copy_inputs,
    evaluated_otherwise,
    keep_inputs,
    open_inputs,
    replaced_inputs,
    with_changes,
)
from boltznce.signals import stop_if_asked
from boltznce.systems.base import System
from boltznce.systems.identity import differences
from boltznce.trust import check_trusted

try:
    import resource
except ModuleNotFoundError:  # Windows
    resource = None  # type: ignore[assignment]

__all__ = ["RUN", "RunFolder", "peak_memory"]

log = logging.getLogger(__name__)
REMEDY = "restore it, or start a new run in another folder"
AGAIN = "delete it and resume the run"
RUN = Kind(
    "a run", "run.json", names=r"\.hydra|(cli|train)\.log|failed\.txt"
)  # Hydra's and a sweep's, which come first
RESULTS = ("checkpoints", "samples")  # what unfinished stages leave
HEARTBEAT = 10.0  # seconds between two bookings of a running stage's time: what a kill can lose


class RunFolder:
    """A folder with ``config.yaml`` (resolved), copies of the files that this names (see `boltznce.run_inputs`), and

    ``run.json``: its format, the system's name and identity and, for each stage,
    ``seconds`` (wall clock, killed sessions included), ``cpu_seconds`` (see `boltznce.clock`), ``peak_memory`` (MiB),
    ``finished`` (UTC, or null), ``leaves`` (see :meth:`leave`) and what the stage adds. :meth:`create` makes one or
    goes on in one, :meth:`open` takes what is there.

    What the config of an opened folder names is not imported unless it is the library's, registered or ``trust`` is
    true (see `boltznce.trust`). A folder that was not started where it lies is ``foreign``: it is written, but nothing
    outside of it. One that ships with the package (`boltznce.pretrained`) is trusted as that is, and never written.
    """

    def __init__(self, path: Path, trust: bool = False):
        self.path, self.trust = Path(path), trust or is_shipped(path)
        self.checked = False  # whether its config has passed `boltznce.methods.preflight`, in this process
        self._lock = threading.Lock()  # the heartbeat and the stage both write
        self._running: str | None = None

    def __str__(self) -> str:
        return shown(self.path)

    @classmethod
    def create(cls, path: Path, config: DictConfig, system: str) -> "RunFolder":
        """Start a run of the named system, or go on in its folder; files that the config names are copied into it.

        Raises UserError if the folder holds results of another system, or of other settings that they depend on, or
        files that are not a run's, and where another process is at work.
        """
        run, settings = cls(path, trust=True), as_dict(config, resolve=True)
        run.check_own()
        sources = keep_inputs(settings)
        if not run._record_path.exists():
            claim(path, RUN, "another hydra.run.dir, or output")
        with only_process(path):
            begun = run._record_path.exists()
            if begun:
                run.check_system(system)
                run._check_settings(settings, sources)
            run.path.mkdir(parents=True, exist_ok=True)
            copy_inputs(run.path, sources)
            with atomic_file(run._config_path) as temporary:
                OmegaConf.save(OmegaConf.create(sealed(settings)), temporary)
            if not begun:
                home = run.path.stat().st_ino
                run._write({"format": RUN_FORMAT, "system": system, "started": _now(), "home": home, "stages": {}})
        return run

    @classmethod
    def open(cls, path: Path, trust: bool = False) -> "RunFolder":
        """The run in an existing folder, or one that ships, by ``pretrained/<name>`` (see `boltznce.pretrained`).

        Raises UserError where there is none, or one of another version.
        """
        run = cls(located(path), trust)
        if not run.path.is_dir():
            raise UserError(f"There is no folder {path}: give the folder of a run that train.py has started.")
        missing = [file.name for file in (run._config_path, run._record_path) if not file.is_file()]
        if missing:
            names = " and no ".join(missing)
            raise UserError(f"{path} is not a run folder, it has no {names}: give one that train.py has started.")
        run._read()
        run.check_links()
        return run

    @property
    def config(self) -> DictConfig:
        """The resolved config that the run was last started with, its files those of the folder.

        Raises UserError if it is damaged or not trusted.
        """
        contents = open_inputs(self._settings(), self.path)
        if not self.trust:
            check_trusted(contents, self._config_path)
        return OmegaConf.create(contents)

    def change(self, given: Mapping[str, Any]) -> None:
        """Go on with other values of some settings, by their dotted names (see `run_inputs.with_changes`).

        What was drawn to be evaluated in another way is set aside. Raises UserError for settings that decide what is
        trained, and where another process is at work.
        """
        before = self._settings()
        after = with_changes(before, given)
        with only_process(self.path):
            if evaluated_otherwise(before, after):
                self._undo("evaluation")
            with atomic_file(self._config_path) as temporary:
                OmegaConf.save(OmegaConf.create(sealed(after)), temporary)

    def _settings(self) -> dict:
        """The config as it is on disk."""
        contents = as_dict(read_settings(self._config_path, REMEDY))
        if "${" in str(contents):
            raise damaged(self._config_path, "it refers to values in place of having them", REMEDY)
        return contents

    @property
    def metrics(self) -> dict[str, Any]:
        """The numbers of the run's report; raises UserError before there is one, and where they are damaged."""
        path = self.path / "metrics.json"
        if not path.exists():
            finish = command_line("train", f"resume={self.path}")
            raise UserError(f"{self.path} has no report yet: finish the run with {finish}.")
        for name, stage in self.stages.items():
            if "metrics.json" in stage.get("leaves", {}):
                self.check_left(name)
        return read_json(path, AGAIN)

    @property
    def outputs(self) -> Path:
        """Where what is made of the run goes, if nothing else is said: its folder, unless that is only read."""
        return outputs_of(self.path)

    def check_own(self) -> None:
        """Raise UserError for a run that ships with the package: it is finished, and only read."""
        if is_shipped(self.path):
            start = command_line("finetune", f"run={self}", "peptide=...")
            raise UserError(
                f"{self} ships with the package, where nothing is written: fine-tune it to a molecule with {start}, or "
                "train a run of your own in another folder."
            )

    @property
    def foreign(self) -> bool:
        """Whether the run was started elsewhere, downloaded or copied, and is not said to be trusted."""
        if self.trust:
            return False
        try:
            home = read_json(self._record_path, REMEDY).get("home")
        except UserError:
            home = None
        return home != self.path.stat().st_ino

    def check_links(self) -> None:
        """Raise UserError for a link out of a foreign run folder: what is written there would be written elsewhere."""
        if not self.foreign:
            return
        inside = self.path.resolve()
        for folder, folders, files in os.walk(self.path):
            for path in (Path(folder) / name for name in (*folders, *files)):
                if path.is_symlink() and not path.resolve().is_relative_to(inside):
                    raise UserError(
                        f"{path} leads out of a run that was not started here: delete it, or say trust=true."
                    )

    def check_writes(self, path: Path) -> None:
        """Raise UserError if the run is foreign and the path is outside of its folder."""
        if self.foreign and not path.resolve().is_relative_to(self.path.resolve()):
            raise UserError(
                f"{self.path} was not started here and would write to {path}: make the data there first with "
                f"{command_line('simulate')}, or say trust=true."
            )

    @property
    def system(self) -> str:
        """The system's name."""
        return self._read()["system"]

    @property
    def started(self) -> str:
        """When, UTC."""
        return self._read().get("started", "")

    @property
    def stages(self) -> dict[str, dict]:
        """The record of each stage that has begun, in order."""
        return self._read()["stages"]

    def check_system(self, name: str) -> None:
        """Raise UserError if this is not a run of the named system."""
        if self.system != name:
            found = f"{self.path} is a run of another system, '{self.system}', not '{name}'"
            raise UserError(f"{found}: choose another hydra.run.dir.")

    def _check_settings(self, settings: dict, sources: Mapping[str, Path]) -> None:
        """Raise UserError if there are results, and they are of other settings or of other input files."""
        if not (any(map(self.stage_done, self.stages)) or any((self.path / name).exists() for name in RESULTS)):
            self._write(self._read() | {"identity": None})
            return
        pairs = changed_settings(self._settings(), settings)
        changed = [f"{key}: {old}, not {new}" for key, (old, new) in pairs.items()]
        changed += [f"the contents of {source}" for source in replaced_inputs(self.path, sources)]
        if changed:
            raise UserError(
                f"{self.path} holds a run with other settings ({first_few(changed)}): choose another "
                f"hydra.run.dir, or go on with the run's own by resume={self.path}."
            )

    def record_identity(self, system: System) -> None:
        """Write down what the run's system is, once."""
        with self._lock:
            record = self._read()
            if record.get("identity") is None:
                self._write(record | {"identity": system.identity})

    def check_identity(self, system: System) -> None:
        """Raise UserError, saying what differs, if the system is no longer the one that was written down."""
        recorded = self._read().get("identity")
        if recorded and (told := differences(recorded, system.identity)):
            raise UserError(
                f"The config of {self.path} no longer gives the system of the run: {' and '.join(told.values())}. "
                "Restore its files, or the version of OpenMM that it was made with, or start a new run."
            )

    # ---- stages, and what they leave --------------------------------------------------------------------------------

    def stage_done(self, name: str) -> bool:
        """Whether the stage has come to its end, and what it left is there.

        What is not in the folder (data) may be gone once the next stage, which has used it, is done.
        """
        record, later = self.stages.get(name, {}), list(self.stages)
        if record.get("finished") is None:
            return False
        later = later[later.index(name) + 1 :]
        used = bool(later) and self.stage_done(later[0])
        needed = [leaf for leaf in record.get("leaves", {}) if not (used and Path(leaf).is_absolute())]
        return all(_is_there(self.path / leaf) for leaf in needed)

    def leave(self, path: Path) -> Path:
        """Note that the stage that is running leaves this file, or this folder of samples or data; returns it.

        A finished stage whose leavings are gone is not done. One that is run again and leaves something else than
        before undoes the stages after it: what they left goes to the folder ``aside-<number>``.
        """
        if self._running is not None:
            with self._lock:
                record = self._read()
                record["stages"][self._running].setdefault("leaves", {}).setdefault(self._leaf(path), None)
                self._write(record)
        return path

    def check_left(self, name: str) -> None:
        """Raise UserError if a file in the folder is not the one that the finished stage left."""
        record = self.stages.get(name, {})
        for (leaf, digest), path in zip(record.get("leaves", {}).items(), self._places(record), strict=True):
            ours = digest and record.get("finished") and not Path(leaf).is_absolute()
            if ours and _is_there(path) and _content(path) != digest:
                raise damaged(path, f"it is not what the stage {name} left", AGAIN)

    def set_aside(self, paths: Iterable[Path]) -> None:
        """Move away what was made of something that is no more, finished or begun; what is outside stays."""
        number = 1 + max(
            (int(path.name[6:]) for path in self.path.glob("aside-*") if path.name[6:].isdigit()), default=0
        )
        aside, moved = self.path / f"aside-{number}", []
        for path in paths:
            whole = [path, path.with_suffix("")] if path.suffix in (".safetensors", ".json") else [path]
            for each in (*whole, *(each.with_name(f".{each.name}.partial") for each in whole)):
                if each.exists() and each.resolve().is_relative_to(self.path.resolve()):
                    target = aside / each.relative_to(self.path)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    os.replace(each, target)
                    moved.append(each.relative_to(self.path).as_posix())
        if moved:
            log.warning("%s: made of something that is no more, and so moved to %s", ", ".join(moved), aside)

    def mark_done(self, name: str, info: dict | None = None) -> None:
        """Record that a stage is done, with anything JSON can hold; what it had recorded before stays."""
        with self._lock:
            record = self._read()
            entry = record["stages"].setdefault(name, _fresh())
            if "leaves" in entry:
                before, places = entry["leaves"], self._places(entry)
                left = {leaf: _content(path) for leaf, path in zip(before, places, strict=True) if _is_there(path)}
                if any(before[leaf] not in (None, left.get(leaf)) for leaf in before):
                    self._undo_after(record["stages"], name)
                entry["leaves"] = left
            entry.update(info or {}, finished=_now())
            self._write(record)

    def _undo(self, name: str) -> None:
        with self._lock:
            record = self._read()
            order = list(stages := record["stages"])
            if name in order:
                undone = [stages.pop(each) for each in order[order.index(name) :]]
                self.set_aside(place for stage in undone for place in self._places(stage))
                self._write(record)

    def _undo_after(self, stages: dict[str, dict], name: str) -> None:
        order = list(stages)
        for later in order[order.index(name) + 1 :]:
            self.set_aside(self._places(stages.pop(later)))

    def _leaf(self, path: Path) -> str:
        path, home = Path(path).absolute(), self.path.absolute()
        return path.relative_to(home).as_posix() if path.is_relative_to(home) else str(path)

    def _places(self, record: Mapping[str, Any]) -> list[Path]:
        return [self.path / leaf for leaf in record.get("leaves", {})]

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[dict]:
        """Time a stage, and mark it done if the block ends well, with what the block puts into the given dictionary.

        Time is added to that of earlier, interrupted sessions, and booked every few seconds: a kill loses next to none.
        """
        info: dict = {}
        earlier = self.stages.get(name, {})
        seconds, spent, memory = (earlier.get(key, 0.0) for key in ("seconds", "cpu_seconds", "peak_memory"))
        started, spent_before, ended = time.perf_counter(), cpu_seconds(), threading.Event()

        def book() -> None:
            total = round(seconds + time.perf_counter() - started, 2)
            work = round(spent + cpu_seconds() - spent_before, 2)
            self._book(name, {"seconds": total, "cpu_seconds": work, "peak_memory": max(memory, peak_memory())})

        def beat() -> None:
            while not ended.wait(HEARTBEAT):
                with contextlib.suppress(UserError, OSError):  # a full disk: the stage itself will say so
                    book()

        stop_if_asked()
        book()
        self._book(name, {"finished": None})
        self._running = name
        heart = threading.Thread(target=beat, daemon=True)
        heart.start()
        try:
            yield info
        finally:
            ended.set()
            heart.join()
            with contextlib.suppress(UserError, OSError):
                book()
            self._running = None
        self.mark_done(name, info)

    def _book(self, name: str, values: dict) -> None:
        with self._lock:
            record = self._read()
            record["stages"].setdefault(name, _fresh()).update(values)
            self._write(record)

    def _read(self) -> dict:
        record = read_json(self._record_path, REMEDY)
        stages = record.get("stages")
        if "system" not in record or not isinstance(stages, dict):
            raise damaged(self._record_path, "it lacks an entry", REMEDY)
        if not all(isinstance(stage, dict) and isinstance(stage.get("leaves", {}), dict) for stage in stages.values()):
            raise damaged(self._record_path, "its stages are no records", REMEDY)
        check_format(record.get("format"), RUN_FORMAT, self.path)
        if record.get("format", 1) < RUN_FORMAT:
            raise UserError(
                f"{self.path} was trained by an older version: train it anew, or use boltznce 0.1.0 (commit e61416c)."
            )
        return record

    def _write(self, record: dict) -> None:
        self.check_own()
        with atomic_file(self._record_path) as temporary:
            temporary.write_text(json.dumps(sealed(record), indent=2) + "\n", encoding="utf-8")

    @property
    def _config_path(self) -> Path:
        return self.path / "config.yaml"

    @property
    def _record_path(self) -> Path:
        return self.path / "run.json"


def peak_memory() -> float:
    """Largest resident memory so far, in MiB, of this process plus its largest finished child; 0 on Windows."""
    if resource is None:
        return 0.0
    usage = sum(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return round(usage / (2**20 if sys.platform == "darwin" else 2**10), 1)


def _fresh() -> dict[str, Any]:
    return {"seconds": 0.0, "cpu_seconds": 0.0, "peak_memory": 0.0, "finished": None}


def _is_there(path: Path) -> bool:
    return path.is_file() or (path / "meta.yaml").is_file()


def _content(path: Path) -> str:
    """A digest of what later stages read of a file or folder: of weights and arrays alone, not of dates and costs."""
    if path.suffix == ".safetensors":
        return weights_digest(path)
    if path.is_dir():
        digests = read_yaml(path / "meta.yaml", AGAIN.replace("it", "its folder", 1)).get("digests", {})
        return ",".join(f"{name}:{str(digest)[:16]}" for name, digest in digests.items() if name.endswith(".npy"))
    return file_digest(path)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
