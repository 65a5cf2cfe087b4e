"""Writing that leaves either the whole result or nothing, and digests that tell damage from data."""

import contextlib
import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from boltznce.errors import UserError

__all__ = [
    "atomic_file",
    "atomic_folder",
    "check_format",
    "file_digest",
    "full_disk_is_a_user_error",
    "require_free_space",
]

DATA_FORMAT = 1  # of datasets and of weighted samples, as their meta.yaml says it; those that say nothing have it
RUN_FORMAT = 2  # of run folders, as their run.json says it; those that say nothing have 1


def check_format(found: int | None, known: int, what: Path | str) -> None:
    """Raise UserError if ``what`` was written in a format that is newer than the known one; None is format 1."""
    if (found or 1) > known:
        raise UserError(f"{what} has format {found}, this version knows up to {known}: update boltznce to read it.")


@contextlib.contextmanager
def full_disk_is_a_user_error(path: Path) -> Iterator[None]:
    """Turn "no space left on device" into one sentence that names the folder."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"No disk space left while writing {path}: "
                "free some space, or choose another data_dir or hydra.run.dir."
            ) from error
        raise


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


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Give a temporary name beside ``path`` to write to; rename it to ``path`` once the block has ended well."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with full_disk_is_a_user_error(path):
            yield temporary
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Give a temporary folder beside ``path`` to fill; it takes the place of ``path`` once the block has ended well."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        with full_disk_is_a_user_error(path):
            yield temporary
            if path.exists():
                shutil.rmtree(path)
            os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def file_digest(path: Path) -> str:
    """SHA-256 of a file, read in chunks."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
