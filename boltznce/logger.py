"""Where the numbers of a training go: always a CSV file, and W&B or TensorBoard when the config asks for it."""

import csv
import hashlib
import netrc
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

from boltznce.errors import UserError
from boltznce.io import atomic_file, disk_errors_told
from boltznce.records import damaged

__all__ = ["CSVLog", "Logger", "TensorBoardLogger", "WandbLogger", "open_logger", "read_log"]


class Logger(Protocol):
    """Anything that takes named numbers; the names say stage and quantity, as in ``flow/train/loss``."""

    def log(self, values: Mapping[str, float]) -> None:
        """Take note of named numbers of one step; ``<stage>/step`` says which."""

    def summarize(self, values: Mapping[str, float], figures: Iterable[Path]) -> None:
        """Take note of what a run ends with: its main numbers, and figures by their PNG files."""

    def close(self) -> None:
        """All that was noted is where it belongs."""


class CSVLog:
    """A table with a row for each report, whose first column is ``step``; opened at an earlier step it forgets more.

    A column that first appears in a later row is added at the right, and is empty in the rows before.
    """

    def __init__(self, path: Path, step: int = 0):
        self.path = Path(path)
        rows = self._read()
        #: the last row on file, also if it is one of those forgotten; empty for a new file
        self.last: dict[str, str] = rows[-1] if rows else {}
        self.columns: list[str] = list(self.last)
        self._write([row for row in rows if int(row["step"]) <= step])

    def append(self, row: Mapping[str, float]) -> None:
        """Write a row at once; new columns rewrite the file."""
        new = [key for key in row if key not in self.columns]
        if new:
            self.columns += new
            self._write(self._read())
        with disk_errors_told(self.path), open(self.path, "a", newline="", encoding="utf-8") as handle:
            csv.writer(handle).writerow([_text(row.get(column, "")) for column in self.columns])

    def _read(self) -> list[dict[str, str]]:
        return read_log(self.path)

    def _write(self, rows: list[dict[str, str]]) -> None:
        with atomic_file(self.path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as handle:
            writer = csv.DictWriter(handle, self.columns, restval="")
            if self.columns:
                writer.writeheader()
            writer.writerows(rows)


def read_log(path: Path) -> list[dict[str, str]]:
    """The rows of a `CSVLog`, none where there is no file; raises UserError where a cell is not a number."""
    if not Path(path).exists():
        return []
    try:
        text = Path(path).read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1]  # a killed process may leave half a line
        rows = list(csv.DictReader(whole.splitlines(), restval=""))
        for row in rows:
            int(row["step"])
            [float(cell) for cell in row.values() if cell != ""]  # a list of cells beyond the last column is no number
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        raise damaged(path, "it is not a table of numbers", "delete it, nothing but a curve is lost") from error
    return rows


def _text(value: float | str) -> str:
    return f"{value:.8g}" if isinstance(value, float) else str(value)


class WandbLogger:
    """Sends the numbers to Weights & Biases, where a run folder is always the same run, also a resumed one.

    mode: "online", "offline" (``wandb sync`` uploads later), "disabled", or None: online for a user who is logged in,
    otherwise offline. Never asks for a login: raises UserError where "online" lacks one.
    """

    def __init__(self, folder: Path, project: str, mode: str | None = None, config: Mapping | None = None):
        import wandb  # slow to import, and most runs do without

        mode = mode or os.environ.get("WANDB_MODE") or ("online" if _logged_in() else "offline")
        if mode == "online" and not _logged_in():
            raise UserError("logger.mode=online needs a login: run `wandb login` first, or set logger.mode=offline.")
        folder = Path(folder).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        identity = hashlib.sha256(str(folder).encode()).hexdigest()[:16]
        resume = "allow" if mode == "online" else None  # offline runs cannot be continued: syncing merges them by id
        where: dict[str, Any] = {"project": project, "name": folder.name, "id": identity, "dir": str(folder)}
        where |= {"mode": mode, "resume": resume}
        self._run = wandb.init(**where, config=dict(config or {}))

    def log(self, values: Mapping[str, float]) -> None:
        self._run.log(dict(values))

    def summarize(self, values: Mapping[str, float], figures: Iterable[Path]) -> None:
        import wandb

        self._run.summary.update(dict(values))
        self._run.log({f"figures/{path.stem}": wandb.Image(str(path)) for path in figures})

    def close(self) -> None:
        self._run.finish()


class TensorBoardLogger:
    """Writes event files for ``tensorboard --logdir <run folder>``. Raises UserError where TensorBoard is not there."""

    def __init__(self, folder: Path):
        try:
            from torch.utils.tensorboard import SummaryWriter  # slow to import, and an extra
        except ImportError as error:
            raise UserError('logger=tensorboard needs TensorBoard: pip install "boltznce[tensorboard]".') from error
        self._writer = SummaryWriter(str(Path(folder) / "tensorboard"))

    def log(self, values: Mapping[str, float]) -> None:
        step = next((int(value) for name, value in values.items() if name.endswith("/step")), None)
        for name, value in values.items():
            if not name.endswith("/step"):
                self._writer.add_scalar(name, value, step)

    def summarize(self, values: Mapping[str, float], figures: Iterable[Path]) -> None:
        from matplotlib.image import imread

        for name, value in values.items():
            self._writer.add_scalar(f"report/{name}", value)
        for path in figures:
            self._writer.add_image(f"figures/{path.stem}", imread(path), dataformats="HWC")

    def close(self) -> None:
        self._writer.close()


def open_logger(
    folder: Path,
    config: Mapping | None,
    /,
    kind: Literal["csv", "wandb", "tensorboard"],
    project: str = "boltznce",
    mode: str | None = None,
) -> WandbLogger | TensorBoardLogger | None:
    """The logger that the ``logger`` part of a config asks for, ``open_logger(folder, config, **config.logger)``.

    None for ``csv``: `boltznce.training.fit` writes those files in any case. Raises UserError for an unknown kind.
    """
    if kind == "csv":
        return None
    if kind == "wandb":
        return WandbLogger(folder, project, mode, config)
    if kind == "tensorboard":
        return TensorBoardLogger(folder)
    raise UserError(f"Unknown logger '{kind}': choose csv, wandb or tensorboard.")


def _logged_in() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        return False
