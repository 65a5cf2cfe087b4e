"""The files of a force field: whose they are, which others they include, and whether one would have Python run."""

import re
from pathlib import Path, PurePosixPath
from xml.etree import ElementTree

from openmm import app

from boltznce.errors import UserError

__all__ = ["has_scripts", "kind_of", "shipped_file", "with_included"]

MOST_BYTES = 2**28
SCRIPTS = {"Script", "InitializationScript"}
CODE = {"useDispersionCorrection"}  # attributes that OpenMM evaluates


def shipped_file(name: str) -> Path | None:
    """The file of this name that comes with OpenMM, or with a package of force fields for it; None for any other.

    >>> shipped_file("amber14-all.xml").name, shipped_file("../amber14-all.xml"), shipped_file("mine.xml")
    ('amber14-all.xml', None, None)
    """
    for folder in map(Path, app.forcefield._getDataDirectories()):
        path = folder / name
        if not Path(name).is_absolute() and ".." not in Path(name).parts and path.is_file():
            return path
    return None


def kind_of(name: str | Path) -> str:
    """Whose a file is: ``Amber``, ``CHARMM`` (a PSF), ``GROMACS``, ``System`` (serialized), else ``OpenMM``.

    >>> kind_of("amber14-all.xml"), kind_of("no such file")
    ('OpenMM', 'OpenMM')
    """
    path = Path(name).expanduser()
    if shipped_file(str(name)) is not None or not path.is_file():
        return "OpenMM"
    with open(path, "rb") as handle:
        start = handle.read(8)
    if start == b"%VERSION":
        return "Amber"
    if start.startswith(b"PSF"):
        return "CHARMM"
    if path.suffix.lower() in (".top", ".itp"):
        return "GROMACS"
    try:
        _, root = next(ElementTree.iterparse(path, events=("start",)))
    except (ElementTree.ParseError, StopIteration):
        return "OpenMM"
    return "System" if root.tag == "System" else "OpenMM"


def with_included(path: Path, name: str) -> dict[str, Path]:
    """A force-field file and those that it includes from its folder, by their names there.

    Those that are not there are OpenMM's or GROMACS's own. Raises UserError for one from outside the folder.
    """
    found, waiting = {name: path}, [(path, PurePosixPath(name))]
    includes = _gromacs_includes if kind_of(path) == "GROMACS" else _xml_includes
    while waiting:
        here, its_name = waiting.pop()
        for file in includes(here):
            if Path(file).is_absolute() or ".." in Path(file).parts:
                raise UserError(f"{here} includes {file}, from outside its folder: put that file beside it.")
            for beside, folder in ((path, PurePosixPath(name)), (here, its_name)):  # GROMACS looks in both
                place, new = beside.parent / file, folder.parent / file
                if place.is_file() and str(new) not in found:
                    found[str(new)] = place
                    waiting.append((place, new))
    return found


def _gromacs_includes(path: Path) -> list[str]:
    text = path.read_text(encoding="utf-8", errors="replace")
    lines = re.findall(r"^\s*#include\s+([^;\n]+)", text, re.MULTILINE)
    return [line.strip(' \t\r"<>') for line in lines]


def _xml_includes(path: Path) -> list[str]:
    try:
        included = ElementTree.parse(path).getroot().findall("Include")
    except ElementTree.ParseError:
        return []  # the reader will tell
    return [file for element in included if (file := element.get("file"))]


def has_scripts(path: Path) -> bool:
    """Whether OpenMM would run code of a file that did not come with it, or of others that it includes.

    Raises UserError for a file that is none.
    """
    if not path.is_file() or path.stat().st_size > MOST_BYTES:
        raise UserError(
            f"There is no force field {path}: give the path of an XML file, or the name of one of OpenMM's."
        )
    try:
        elements = list(ElementTree.parse(path).getroot().iter())
    except ElementTree.ParseError as error:
        raise UserError(f"The force field {path} cannot be read ({error}): it must be an XML file.") from error
    includes = (element.get("file", "") for element in elements if element.tag == "Include")
    return (
        any(element.tag in SCRIPTS for element in elements)
        or any(element.get(name, "True") not in ("True", "False") for element in elements for name in CODE)
        or any(shipped_file(file) is None or (path.parent / file).exists() for file in includes)
    )
