"""Folders that are written: nothing in them that is not ours is overwritten, and one process works at a time."""

import contextlib
import dataclasses
import re
import shutil
import time
import weakref
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from boltznce.errors import UserError
from boltznce.io import disk_errors_told, is_temporary
from boltznce.records import contents_of

__all__ = ["Held", "Kind", "claim", "discard", "file_of_ours", "hold", "inside", "only_process"]

LOCK = ".lock"


@dataclasses.dataclass(frozen=True)
class Kind:
    """How a folder of ours is known: a marker file with these keys; and what may lie there besides.

    Attributes:
        what: in words, for messages.
        marker: a JSON or YAML file; None for working files, which are known by their names alone.
        keys: that the marker has at its top.
        names: pattern of the names of other files and folders of ours.
        whole: the folder is replaced as a whole, so that nothing else may lie there.
    """

    what: str
    marker: str | None = None
    keys: frozenset[str] = frozenset()
    names: str = "(?!)"
    whole: bool = False


def claim(folder: Path | str, kind: Kind, setting: str = "another folder") -> None:
    """Raise UserError unless ``folder`` does not exist, is empty, or is ours, of this kind: before any work.

    ``setting`` is what the message tells to choose.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file, and no folder can be made there: choose {setting}.")
    found = {path.name for path in folder.iterdir()} if folder.exists() else set()
    found = {name for name in found if name != LOCK and not is_temporary(name)}
    ours: set[str] = set()
    if marked := kind.marker in found and file_of_ours(folder / kind.marker, kind.keys):
        ours.add(kind.marker)
        if kind.whole:
            digests = contents_of(folder / kind.marker).get("digests")
            ours |= set(digests if isinstance(digests, dict) else ())
    if marked or not kind.whole or kind.marker is None:
        ours |= {name for name in found if re.fullmatch(kind.names, name)}
    foreign = sorted(name for name in found - ours if not _holds(folder / name, kind))
    if foreign and (kind.whole or not marked):
        raise UserError(
            f"{folder} has files that are not those of {kind.what} ({foreign[0]}, of {len(found)} in all), and nothing "
            f"of others is overwritten: choose {setting}."
        )


def discard(folder: Path, kind: Kind) -> None:
    """Delete a folder of ours, if it is there; raises UserError for one with anything else in it."""
    if folder.exists():
        claim(folder, dataclasses.replace(kind, whole=True))
        shutil.rmtree(folder, ignore_errors=True)


def file_of_ours(path: Path, keys: frozenset[str]) -> bool:
    """Whether a JSON or YAML file is a table that has these keys."""
    return bool(contents := contents_of(path)) and keys <= set(contents)


class Held:
    """A lock that is held until ``release()``, the end of this object, or that of the process, however it ends."""

    def __init__(self, lock: FileLock):
        self.release = weakref.finalize(self, _release, lock)


def hold(folder: Path | str, *, beside: bool = False, wait: bool = False) -> Held:
    """Lock a folder that is written; raises UserError where another process has.

    Args:
        beside: the lock is ``.<name>.lock`` beside the folder, which is put in place when it is whole; otherwise it is
            ``.lock`` in the folder.
        wait: for another process to end, in place of a UserError.
    """
    folder = Path(folder).absolute()
    path = folder.with_name(f".{folder.name}{LOCK}") if beside else folder / LOCK
    with disk_errors_told(folder):
        path.parent.mkdir(parents=True, exist_ok=True)
        # one of this process: a second call in a notebook does not wait for itself
        lock = FileLock(path, is_singleton=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if not wait:
                raise UserError(
                    f"Another process works in {folder}: wait for it to end, or choose another folder."
                ) from None
            print(f"Waiting for another process that works in {folder}.", flush=True)
            while not lock.is_locked:
                with contextlib.suppress(Timeout):
                    lock.acquire(timeout=0)
                time.sleep(0.2)
    return Held(lock)


def _release(lock: FileLock) -> None:
    """Let go of a lock and of its file; the latter first, so that nobody takes a file that then goes."""
    if lock.is_locked and lock.lock_counter == 1:
        with contextlib.suppress(OSError):  # Windows, where the lock does it
            Path(lock.lock_file).unlink()
    lock.release()


@contextlib.contextmanager
def only_process(folder: Path | str, *, beside: bool = False, wait: bool = False) -> Iterator[None]:
    """`hold` a folder for the time of the block."""
    held = hold(folder, beside=beside, wait=wait)
    try:
        yield
    finally:
        held.release()


def inside(parent: Path | str, name: str, setting: str) -> Path:
    """``parent / name``; raises UserError for a name that is empty, or leads out of ``parent``."""
    if not Path(name).parts or Path(name).is_absolute() or ".." in Path(name).parts:
        raise UserError(f"{setting}={name!r} names no folder in {parent}: give a name such as my_run.")
    return Path(parent) / name


def _holds(folder: Path, kind: Kind) -> bool:
    """Whether a subfolder is one of this kind itself."""
    return not kind.whole and kind.marker is not None and file_of_ours(folder / kind.marker, kind.keys)
