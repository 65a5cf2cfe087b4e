"""Trained models that ship with the package: run folders that are only read, called ``pretrained/<name>``.

What is made of one goes to ``outputs/pretrained/<name>`` in the working directory. `boltznce.pretrained.export` makes
one of a finished run.
"""

from pathlib import Path

from boltznce.errors import UserError

__all__ = ["FOLDER", "available", "folder_of", "is_shipped", "located", "outputs_of", "shown"]

FOLDER = Path(__file__).parent
PREFIX = "pretrained"
MARKERS = ("config.yaml", "run.json")  # a folder with one of them was meant for a run


def available() -> list[str]:
    """Names of the models that this version of the package has."""
    return sorted(path.parent.name for path in FOLDER.glob("*/run.json"))


def folder_of(name: str) -> Path:
    """The run folder of a model that ships. Raises UserError, listing those that there are, for a name that is none.

    >>> folder_of("nothing")
    Traceback (most recent call last):
    boltznce.errors.UserError: There is no pretrained model nothing; there are: ...
    """
    if name not in available():
        raise UserError(f"There is no pretrained model {name}; there are: {', '.join(available()) or 'none'}.")
    return FOLDER / name


def located(path: Path | str) -> Path:
    """The folder of the run that a user names: ``pretrained/<name>`` is a model that ships, anything else a path.

    A run that lies at this path in the working directory goes before one that ships. Raises UserError as `folder_of`.
    """
    path = Path(path)
    first, *rest = path.parts or ("",)
    if first != PREFIX or len(rest) != 1 or any((path / marker).exists() for marker in MARKERS):
        return path
    return folder_of(rest[0])


def is_shipped(path: Path | str) -> bool:
    """Whether a folder, or what lies in it, is the package's own and so is only read."""
    return FOLDER.resolve() in Path(path).resolve().parents


def shown(path: Path | str) -> str:
    """What a user types for the run in a folder."""
    return f"{PREFIX}/{Path(path).resolve().name}" if is_shipped(path) else str(path)


def outputs_of(path: Path | str) -> Path:
    """Where what is made of the run in a folder goes: there, or, of one that ships, below the working directory."""
    return Path("outputs", shown(path)) if is_shipped(path) else Path(path)
