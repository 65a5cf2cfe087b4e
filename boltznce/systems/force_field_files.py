"""The XML files of a force field: those that come with OpenMM, and whether one would have OpenMM run Python."""

from pathlib import Path
from xml.etree import ElementTree

from openmm import app

from boltznce.errors import UserError

__all__ = ["has_scripts", "shipped_file"]

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
