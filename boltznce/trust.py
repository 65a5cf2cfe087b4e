"""Whom to believe: what a run folder or a system's file may name, unless it is said to be trusted.

What a user types is hers. What a file says may be somebody else's: it may name the library's own classes, and those
that the user has registered in this process. Nothing else is imported, called or resolved.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from boltznce.errors import UserError

__all__ = ["check_trusted", "is_plain_name", "register", "registered"]

Thing = TypeVar("Thing", bound=type | ModuleType)

_REGISTERED: dict[str, Any] = {}


def register(thing: Thing) -> Thing:
    """Let run folders and files of systems name a class of your own, or the module of a method; returns it.

    >>> from torch import nn
    >>> @register
    ... class MyNetwork(nn.Module):
    ...     pass
    >>> registered(f"{MyNetwork.__module__}.MyNetwork") is MyNetwork
    True
    """
    path = thing.__name__ if isinstance(thing, ModuleType) else f"{thing.__module__}.{thing.__qualname__}"
    _REGISTERED[path] = thing
    return thing


def registered(path: str) -> Any:
    """What was registered under a Python path, or None."""
    return _REGISTERED.get(path)


def check_trusted(settings: Any, source: Path | str) -> None:
    """Raise UserError where settings, as plain mappings and lists, would have foreign code run.

    These are a ``_target_`` that is neither the library's nor registered, a call of a resolver, a force field's file
    that has scripts in it, and any choice of configs but that of a system's kind.
    """
    for key, value in _entries(settings):
        if key == "_target_" and not (str(value).startswith("boltznce.") or str(value) in _REGISTERED):
            raise UserError(
                f"{source} names {value}, which is not part of boltznce and so is not imported: "
                "if it is yours, call boltznce.register on it first, or say trust=true."
            )
        if isinstance(value, str) and ":" in value.partition("${")[2]:
            raise UserError(f"{source} calls a resolver, {value!r}: write the value itself, or say trust=true.")
        if key == "forcefield":
            _check_force_field(value, source)
        if key == "defaults" and any("kind@" not in str(choice) for choice in value or ()):
            raise UserError(
                f"{source} chooses other configs than its kind ({value}): leave them out, or say trust=true."
            )


def is_plain_name(name: object) -> bool:
    """Whether a name can be that of a file: not empty, not a path.

    >>> is_plain_name("aldp"), is_plain_name("../aldp"), is_plain_name("")
    (True, False, False)
    """
    return (
        isinstance(name, str)
        and 0 < len(name) <= 200
        and name.strip(". ") != ""
        and not any(letter in "/\\:" or ord(letter) < 32 for letter in name)
    )


def _check_force_field(files: Any, source: Path | str) -> None:
    # OpenMM is slow to import
    from boltznce.systems.force_field_files import has_scripts, kind_of, shipped_file, with_included

    files = [str(file) for file in (files if isinstance(files, list) else [files])]
    kinds = [kind_of(file) for file in files]
    for file, kind in zip(files, kinds, strict=True):
        if kind == "GROMACS":
            with_included(Path(file), file)  # nothing from outside is read
        elif kind == "OpenMM" and "CHARMM" not in kinds and shipped_file(file) is None and has_scripts(Path(file)):
            raise UserError(
                f"{source} names the force field {file}, which runs scripts: say trust=true if you trust it."
            )


def _entries(settings: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Every value below, with the name under which it stands."""
    yield key, settings
    if isinstance(settings, Mapping):
        for name, value in settings.items():
            yield from _entries(value, str(name))
    elif isinstance(settings, list):
        for value in settings:
            yield from _entries(value)
