"""The folder of a run: its resolved config, and a record of the stages that are done and of what they cost."""

import contextlib
import json
import sys
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ValidationError
from yaml import YAMLError

from boltznce.errors import UserError
from boltznce.io import RUN_FORMAT, atomic_file, check_format

try:
    import resource
except ModuleNotFoundError:  # Windows
    resource = None

__all__ = ["RunFolder", "peak_memory"]

HEARTBEAT = 10.0  # seconds between two bookings of a running stage's time: what a kill can lose


class RunFolder:
    """A folder with ``config.yaml`` (resolved) and ``run.json``: its format, the system's name and, for each stage,

    ``seconds`` (wall clock, killed sessions included), ``peak_memory`` (MiB), ``finished`` (UTC, or null) and what the
    stage adds. :meth:`create` makes one or goes on in one, :meth:`open` takes what is there.
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        self._lock = threading.Lock()  # the heartbeat and the stage both write

    @classmethod
    def create(cls, path: Path, config: DictConfig, system: str) -> "RunFolder":
        """Start a run of the named system, or go on in its folder. Raises UserError if that holds another system."""
        run = cls(path)
        if run._record_path.exists():
            run.check_system(system)
        else:
            run._write({"format": RUN_FORMAT, "system": system, "started": _now(), "stages": {}})
        with atomic_file(run._config_path) as temporary:
            OmegaConf.save(config, temporary, resolve=True)
        return run

    @classmethod
    def open(cls, path: Path) -> "RunFolder":
        """The run in an existing folder. Raises UserError where there is none, or one of another version."""
        run = cls(path)
        if not run.path.is_dir():
            raise UserError(f"There is no folder {path}: give the folder of a run that train.py has started.")
        missing = [file.name for file in (run._config_path, run._record_path) if not file.is_file()]
        if missing:
            missing = " and no ".join(missing)
            raise UserError(f"{path} is not a run folder, it has no {missing}: give one that train.py has started.")
        run._read()
        return run

    @property
    def config(self) -> DictConfig:
        """The resolved config that the run was last started with. Raises UserError if the file is damaged."""
        try:
            return DictConfig(OmegaConf.load(self._config_path))
        except (YAMLError, UnicodeDecodeError, ValidationError, OSError) as error:
            raise _damaged(self._config_path) from error

    @property
    def system(self) -> str:
        """The system's name."""
        return self._read()["system"]

    @property
    def stages(self) -> dict[str, dict]:
        """The record of each stage that has begun, in order."""
        return self._read()["stages"]

    def check_system(self, name: str) -> None:
        """Raise UserError if this is not a run of the named system."""
        if self.system != name:
            found = f"{self.path} is a run of another system, '{self.system}', not '{name}'"
            raise UserError(f"{found}: choose another hydra.run.dir.")

    def stage_done(self, name: str) -> bool:
        """Whether the stage has come to its end."""
        return self.stages.get(name, {}).get("finished") is not None

    def mark_done(self, name: str, info: dict | None = None) -> None:
        """Record that a stage is done, with anything JSON can hold; what it had recorded before stays."""
        self._book(name, dict(info or {}) | {"finished": _now()})

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[dict]:
        """Time a stage, and mark it done if the block ends well, with what the block puts into the given dictionary.

        Time is added to that of earlier, interrupted sessions, and booked every few seconds: a kill loses next to none.
        """
        info: dict = {}
        earlier = self.stages.get(name, {})
        seconds, memory = earlier.get("seconds", 0.0), earlier.get("peak_memory", 0.0)
        started, ended = time.perf_counter(), threading.Event()

        def book() -> None:
            total = round(seconds + time.perf_counter() - started, 2)
            self._book(name, {"seconds": total, "peak_memory": max(memory, peak_memory())})

        def beat() -> None:
            while not ended.wait(HEARTBEAT):
                book()

        book()
        heart = threading.Thread(target=beat, daemon=True)
        heart.start()
        try:
            yield info
        finally:
            ended.set()
            heart.join()
            book()
        self.mark_done(name, info)

    def _book(self, name: str, values: dict) -> None:
        with self._lock:
            record = self._read()
            record["stages"].setdefault(name, {"seconds": 0.0, "peak_memory": 0.0, "finished": None}).update(values)
            self._write(record)

    def _read(self) -> dict:
        try:
            record = json.loads(self._record_path.read_text())
            if not {"system", "stages"} <= set(record):
                raise ValueError("it lacks an entry")
        except ValueError as error:
            raise _damaged(self._record_path) from error
        check_format(record.get("format"), RUN_FORMAT, self.path)
        if record.get("format", 1) < RUN_FORMAT:
            raise UserError(
                f"{self.path} was trained by an older version: train it anew, or use boltznce 0.1.0 (commit e61416c)."
            )
        return record

    def _write(self, record: dict) -> None:
        with atomic_file(self._record_path) as temporary:
            temporary.write_text(json.dumps(record, indent=2) + "\n")

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


def _damaged(path: Path) -> UserError:
    return UserError(f"{path} is damaged: restore it, or start a new run in another folder.")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
