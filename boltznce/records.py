"""Small files that something later depends on: written with a seal, and read so that damage is one sentence.

A record is a mapping in a JSON or YAML file. Its key ``sha256`` is a digest of all the others but ``format``: a record
that has been changed since is refused, one without the key (older, or edited by hand) is taken as it is. Nothing here
executes what it reads: no pickles, no tags of YAML, and no array is made before its size is known to be that of its
file.
"""

import hashlib
import io
import itertools
import json
import math
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import yaml
from numpy.lib import format as npy
from omegaconf import DictConfig, ListConfig, OmegaConf

from boltznce.errors import UserError

__all__ = [
    "as_dict",
    "contents_of",
    "damaged",
    "read_archive",
    "read_array",
    "read_json",
    "read_settings",
    "read_yaml",
    "sealed",
]

SEAL = "sha256"
MOST_BYTES = 2**26  # of a record
MOST_DEPTH = 100
MOST_NODES = 2 * 10**5  # of a record, aliases counted as often as they are used

Shape = tuple[int | None, ...]  # None: any length


def damaged(path: Path | str, what: object, remedy: str) -> UserError:
    """The error for a file that is not what it should be."""
    return UserError(f"{path} is damaged ({what}): {remedy}.")


def sealed(contents: Mapping[str, Any]) -> dict[str, Any]:
    """A record with its seal, behind ``format``: to be written as JSON or YAML.

    >>> list(sealed({"format": 1, "n": 3}))
    ['format', 'sha256', 'n']
    """
    contents = {key: value for key, value in contents.items() if key != SEAL}
    head = {"format": contents.pop("format")} if "format" in contents else {}
    return head | {SEAL: _digest(contents)} | contents


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """The record in a JSON file, without its seal. Raises UserError, which ends with ``remedy``."""
    return _record(path, remedy, json.loads)


def read_yaml(path: Path, remedy: str) -> dict[str, Any]:
    """The record in a YAML file, without its seal. Raises UserError, which ends with ``remedy``."""
    return _record(path, remedy, yaml.safe_load)


def read_settings(path: Path, remedy: str) -> DictConfig:
    """Settings in a YAML file, not resolved, without their seal. Raises UserError, which ends with ``remedy``."""

    def parse(text: str) -> dict:
        _check_size(yaml.safe_load(text))  # before OmegaConf writes out every alias
        return as_dict(OmegaConf.create(text))

    return OmegaConf.create(_record(path, remedy, parse))


def as_dict(config: DictConfig | ListConfig, resolve: bool = False) -> dict[str, Any]:
    """Settings as plain dictionaries and lists."""
    contents: Any = OmegaConf.to_container(config, resolve=resolve)
    return contents


def read_array(
    path: Path, remedy: str, shape: Shape | None = None, dtype: str | None = None, mmap: bool = False
) -> np.ndarray:
    """The array in an .npy file, read-only where ``mmap``. Raises UserError, which ends with ``remedy``.

    Refuses another ``shape`` or ``dtype``, and a file that is not as long as its header says.
    """
    try:
        _require(path)
        with open(path, "rb") as handle:
            found, kind = _header(handle, Path(path).stat().st_size)
        _check_kind(found, kind, shape, dtype)
        return np.load(path, mmap_mode="r" if mmap else None, allow_pickle=False)
    except FileNotFoundError:
        raise damaged(path, "it is missing", remedy) from None
    except _Unfit as error:
        raise damaged(path, error, remedy) from None
    except Exception as error:  # numpy's reader fails in as many ways as a file can be wrong
        raise damaged(path, "it is truncated or not an array file", remedy) from error


def read_archive(path: Path, remedy: str, shapes: Mapping[str, Shape]) -> dict[str, np.ndarray]:
    """The arrays of these names in an .npz file that is not compressed; a name that ends in "?" may be missing.

    Raises UserError, which ends with ``remedy``.
    """
    arrays = {}
    try:
        _require(path)
        with zipfile.ZipFile(path) as archive:  # which checks each member's CRC
            for name, shape in shapes.items():
                member = f"{name.removesuffix('?')}.npy"
                if name.endswith("?") and member not in archive.namelist():
                    continue
                info = archive.getinfo(member)
                if info.compress_type != zipfile.ZIP_STORED or info.file_size > Path(path).stat().st_size:
                    raise _Unfit(f"{member} in it is compressed")
                data = io.BytesIO(archive.read(info))
                _check_kind(*_header(data, info.file_size), shape, None)
                data.seek(0)
                arrays[name.removesuffix("?")] = np.load(data, allow_pickle=False)
    except FileNotFoundError:
        raise damaged(path, "it is missing", remedy) from None
    except _Unfit as error:
        raise damaged(path, error, remedy) from None
    except Exception as error:  # as above
        raise damaged(path, "it is truncated or not an archive of arrays", remedy) from error
    return arrays


class _Unfit(Exception):
    """What is wrong with a file, in words."""


def _require(path: Path) -> None:
    if not Path(path).is_file():  # to open a pipe would wait for its other end
        raise FileNotFoundError(path)


def contents_of(path: Path) -> dict[str, Any]:
    """What a JSON or YAML file says, whether or not its seal fits; nothing where it is no record at all."""
    try:
        return _parsed(Path(path), json.loads if Path(path).suffix == ".json" else yaml.safe_load)
    except Exception:  # text, parsers and nesting fail in as many ways as a file can be wrong
        return {}


def _record(path: Path, remedy: str, parse: Any) -> dict[str, Any]:
    try:
        contents = _parsed(Path(path), parse)
        if contents.get(SEAL, _digest(contents)) != _digest(contents):
            raise _Unfit(f"it is not what was written; if the change is meant, delete its {SEAL}")
    except FileNotFoundError:
        raise damaged(path, "it is missing", remedy) from None
    except _Unfit as error:
        raise damaged(path, error, remedy) from None
    except Exception as error:  # as above
        raise damaged(path, "it cannot be read", remedy) from error
    return {key: value for key, value in contents.items() if key != SEAL}


def _parsed(path: Path, parse: Any) -> dict[str, Any]:
    _require(path)
    if path.stat().st_size > MOST_BYTES:
        raise _Unfit("it is too large to be a record")
    text = path.read_text(encoding="utf-8")
    steps = ((letter in "[{") - (letter in "]}") for letter in text if letter in "[]{}")
    if max(itertools.accumulate(steps), default=0) > MOST_DEPTH:  # a parser would take hours
        raise _Unfit("it is nested too deeply to be a record")
    contents = parse(text)
    _check_size(contents)
    if not isinstance(contents, dict):
        raise _Unfit("it is no mapping of names to values")
    return contents


def _digest(contents: Mapping[str, Any]) -> str:
    """Of everything but seal and format, as JSON: the same whether it was read from JSON or YAML."""
    rest = {str(key): value for key, value in contents.items() if key not in (SEAL, "format")}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, default=str).encode()).hexdigest()


def _check_size(contents: Any) -> None:
    waiting, n = [contents], 0
    while waiting:
        value, n = waiting.pop(), n + 1
        if n > MOST_NODES:
            raise _Unfit("it is too large to be a record")
        waiting.extend(
            [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else ()
        )


def _header(handle: BinaryIO, size: int) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and type of an array; ValueError where they are not those of a file of ``size`` bytes."""
    version = npy.read_magic(handle)
    read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, _, dtype = read(handle)
    if dtype.hasobject or handle.tell() + math.prod(shape) * dtype.itemsize != size:
        raise ValueError("another length than the header says")
    return shape, dtype


def _check_kind(found: tuple[int, ...], kind: np.dtype, shape: Shape | None, dtype: str | None) -> None:
    if shape is not None and (
        len(found) != len(shape) or any(n is not None and n != m for n, m in zip(shape, found, strict=True))
    ):
        wanted = ", ".join("any" if n is None else str(n) for n in shape)
        raise _Unfit(f"its shape is {found}, not ({wanted})")
    if dtype is not None and kind != np.dtype(dtype):
        raise _Unfit(f"its numbers are {kind}, not {np.dtype(dtype)}")
