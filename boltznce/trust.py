"""Whom to believe: what a run folder or a system's file may name, unless it is said to be trusted.

What a user types is hers. What a file says may be somebody else's: it may name the library's own classes, and those
that the user has registered in this process. Nothing else is imported, called or resolved.
"""

import importlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from boltznce.errors import UserError

__all__ = ["check_trusted", "is_plain_name", "locate", "register", "registered"]

Thing = TypeVar("Thing", bound=type | ModuleType | Callable)

_REGISTERED: dict[str, Any] = {}


def register(thing: Thing) -> Thing:
    """Let run folders and files of systems name a class or function of your own, or the module of a method; returns it.

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


def locate(path: str, kind: Any) -> Any:
    """What a Python path such as ``boltznce.networks.gvp.GVPEnergy`` names, imported but not called.

    It must be a subclass of ``kind``, a class or several, or, where that is ``ModuleType``, the module of a method,
    which has ``STAGES``; ``Callable`` is a function that is not the library's. What was registered is not imported.
    Paths that come from a file are to have passed `check_trusted`.

    >>> from torch import nn
    >>> locate("subprocess.getoutput", nn.Module)
    Traceback (most recent call last):
    boltznce.errors.UserError: _target_=subprocess.getoutput is not a Module, and nothing else is made from a config.

    Raises UserError for anything else, and for what does not exist.
    """
    module, _, name = path.rpartition(".")
    try:
        found = registered(path)
        if found is None and kind is ModuleType:
            found = importlib.import_module(path)
        elif found is None:
            found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"_target_={path} cannot be imported: {error}.") from error
    if kind is ModuleType:
        fits, what = "STAGES" in vars(found), "module of a method, with STAGES"
    elif kind is Callable:
        fits, what = callable(found) and not path.startswith("boltznce."), "function of your own"
    else:
        fits = isinstance(found, type) and issubclass(found, kind)
        what = " or a ".join(each.__name__ for each in (kind if isinstance(kind, tuple) else (kind,)))
    if not fits:
        raise UserError(f"_target_={path} is not a {what}, and nothing else is made from a config.")
    return found


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
