"""Writing that leaves either the whole result or nothing; a disk's errors told; digests that tell damage from data."""

import contextlib
import errno
import glob
import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from safetensors import SafetensorError

from boltznce.errors import UserError

__all__ = [
    "atomic_file",
    "atomic_folder",
    "check_format",
    "disk_errors_told",
    "disk_reason",
    "file_digest",
    "is_temporary",
    "put_in_place",
    "remove_leftovers",
    "require_free_space",
    "require_writable",
    "scratch_folder",
]

DATA_FORMAT = 1  # of datasets and of weighted samples, as their meta.yaml says it; those that say nothing have it
RUN_FORMAT = 2  # of run folders, as their run.json says it; those that say nothing have 1

_REMEDY = "free some space, make the folder writable, or choose another output, data_dir or hydra.run.dir, and go on"
_DISK_ERRORS = {
    getattr(errno, name)
    for name in (
        *("ENOSPC", "EDQUOT", "EFBIG", "EROFS", "EACCES", "EPERM", "EIO", "ENOENT", "ENOTDIR", "EISDIR", "ENXIO"),
        *("ENODEV", "ESTALE", "ENAMETOOLONG", "EMFILE"),
    )
    if hasattr(errno, name)
}
_WHAT: dict[int | None, str] = {errno.ENOSPC: "No disk space left", errno.EDQUOT: "The disk quota is used up"}
_TEMPORARY = re.compile(r"\.(?P<name>.+)\.(?P<pid>\d+)\.(?P<suffix>tmp|old)")


def check_format(found: int | None, known: int, what: Path | str) -> None:
    """Raise UserError if ``what`` was written in a format that is newer than the known one; None is format 1."""
    if (found or 1) > known:
        raise UserError(f"{what} has format {found}, this version knows up to {known}: update boltznce to read it.")


@contextlib.contextmanager
def disk_errors_told(path: Path) -> Iterator[None]:
    """Turn an error of the disk while writing ``path`` into a UserError of one sentence, whoever raises it."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = disk_reason(error)
        if reason is None:
            raise
        raise UserError(f"{_WHAT.get(reason[0], reason[1])} while writing {path}: {_REMEDY}.") from error


def disk_reason(error: Exception) -> tuple[int | None, str] | None:
    """Number and name of the error of the disk behind an exception (Python, safetensors, torch, numpy), or None."""
    if isinstance(error, SafetensorError):
        number = re.search(r"os error (\d+)", str(error))
        return (int(number[1]), os.strerror(int(number[1]))) if number else None
    if isinstance(error, OSError):
        if error.errno is None:  # numpy and PIL count the bytes that were written
            return None, "The disk took only a part"
        return (error.errno, os.strerror(error.errno)) if error.errno in _DISK_ERRORS else None
    words = (
        "inline_container",
        "PytorchStreamWriter",
        "iostream error",
        "write failed",
        "write error",
        "unexpected pos",
    )
    return (None, "The disk took only a part") if any(word in str(error) for word in words) else None


def require_free_space(folder: Path, n_bytes: int) -> None:
    """Raise before any long work starts if ``folder``'s disk cannot hold ``n_bytes`` more."""
    existing = Path(folder).absolute()
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if free < n_bytes:
        raise UserError(
            f"Not enough disk space for {folder}: "
            f"{n_bytes / 2**20:.0f} MiB are needed and {free / 2**20:.0f} MiB are free. "
            "Free some space, or choose another data_dir or hydra.run.dir."
        )


def require_writable(folder: Path) -> None:
    """Raise UserError if ``folder`` cannot be made or written to, as far as that can be known without trying."""
    existing = Path(folder).absolute()
    try:
        while not existing.exists():
            existing = existing.parent
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror}. Choose another folder.") from error
    if not existing.is_dir():
        raise UserError(f"The folder {folder} cannot be made, as {existing} is a file: choose another one.")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"The folder {folder} cannot be written, as {existing} may not be: choose another one.")


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Give a temporary name beside ``path`` to write to; rename it to ``path`` once the block has ended well."""
    path = Path(path)
    with disk_errors_told(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path)
    temporary = _beside(path)
    try:
        with disk_errors_told(path):
            yield temporary
            os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: Path, check: Callable[[], None] = lambda: None) -> Iterator[Path]:
    """Give a temporary folder beside ``path`` to fill; it takes the place of ``path`` once the block has ended well.

    ``check`` is called first, and before a folder that is there is replaced: it raises where that must not be.
    """
    path = Path(path)
    check()
    with _empty_folder(path) as temporary:
        yield temporary
        check()
        put_in_place(temporary, path)


def scratch_folder(path: Path) -> contextlib.AbstractContextManager[Path]:
    """Give an empty folder beside ``path`` that goes with the block; those of killed processes go now."""
    return _empty_folder(Path(path).with_name(f"{Path(path).name}.scratch"))


@contextlib.contextmanager
def _empty_folder(path: Path) -> Iterator[Path]:
    """Give a temporary folder beside ``path``, which goes with the block if it is still there."""
    with disk_errors_told(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path)
    temporary = _beside(path)
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with disk_errors_told(path):
            temporary.mkdir()
            yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def put_in_place(folder: Path, path: Path) -> None:
    """Rename a whole folder to ``path``; one of that name goes away after that."""
    before = _beside(path, "old")
    if path.exists():
        os.replace(path, before)
    try:
        os.replace(folder, path)
    except BaseException:
        if before.exists() and not path.exists():
            os.replace(before, path)
        raise
    shutil.rmtree(before, ignore_errors=True)


def is_temporary(name: str) -> bool:
    """Whether a name is one of those that `atomic_file` and `atomic_folder` give."""
    return _TEMPORARY.fullmatch(name) is not None


def remove_leftovers(path: Path) -> None:
    """Delete what killed processes have left of their writing of ``path``; put back what they have put aside."""
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*"):
        found = _TEMPORARY.fullmatch(leftover.name)
        if found and found["name"] == path.name and not _alive(int(found["pid"])):
            if found["suffix"] == "old" and not path.exists():
                os.replace(leftover, path)
            elif leftover.is_dir():
                shutil.rmtree(leftover, ignore_errors=True)
            else:
                leftover.unlink(missing_ok=True)


def _beside(path: Path, suffix: str = "tmp") -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.{suffix}")


def _alive(pid: int) -> bool:
    if os.name == "nt" or pid == os.getpid():  # on Windows, signal 0 would end the process
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def file_digest(path: Path) -> str:
    """SHA-256 of a file, read in chunks."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
