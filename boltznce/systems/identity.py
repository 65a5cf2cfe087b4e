"""What makes data of a system its own, entry by entry, so that a difference can be told in words.

Entries are short: long lists are digests. The ``name`` is among them, and never decides.
"""

import hashlib
import json
import math
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

__all__ = ["differences", "digest", "molecule_identity", "openmm_digest"]

DIGITS = 16  # of a digest
SIGNIFICANT = 9  # digits of a force field's numbers: OpenMM's unit conversions round beyond
FORCE_FIELD = ("force_field", "openmm")  # what energies tell better: files may be renamed, OpenMM may write them anew
_DECIDES = ("formula", "graph", "order", "kind")  # where one differs, what follows from it means nothing
_FOLLOWS = ("graph", "order", "handedness", "parameters")
_WORDS: dict[str, Callable[[Any, Any], str]] = {
    "formula": lambda there, here: f"another molecule ({there}, not {here})",
    "graph": lambda there, here: "other bonds between the same elements",
    "order": lambda there, here: "another order of atoms",
    "handedness": lambda there, here: f"another handedness of the stereocentres ({there}, not {here})",
    "temperature": lambda there, here: f"another temperature ({there:g}, not {here:g})",
    "nonbonded": lambda there, here: f"another nonbonded method ({there}, not {here})",
    "cutoff_nm": lambda there, here: f"another cutoff ({_nm(there)}, not {_nm(here)})",
    "constraints": lambda there, here: f"another number of constraints ({there}, not {here})",
    "charge": lambda there, here: f"another total charge ({there}, not {here})",
    "force_field": lambda there, here: f"another force field ({_joined(there)}, not {_joined(here)})",
    "openmm": lambda there, here: "other parameters of the force field",
}


def digest(value: Any) -> str:
    """A short digest of what JSON can hold, or of a text."""
    text = value if isinstance(value, str) else json.dumps(value)
    return hashlib.sha256(text.encode()).hexdigest()[:DIGITS]


def molecule_identity(
    elements: Sequence[str], bonds: Sequence[tuple[int, int]], handedness: Sequence[float]
) -> dict[str, str]:
    """Entries of a structure: element symbols in order, bonded pairs, and a sign (±1) for each stereocentre.

    ``graph`` is the same in any order of the atoms (colours refined over the bonds), ``order`` is not.

    >>> there, here = (molecule_identity(e, b, []) for e, b in (("OHH", [(0, 1), (0, 2)]), ("HOH", [(0, 1), (1, 2)])))
    >>> there["formula"], differences(there, here)
    ('H2O', {'order': 'another order of atoms'})
    """
    counts = Counter(elements)
    bonded: list[list[int]] = [[] for _ in elements]
    for a, b in bonds:
        bonded[a].append(b)
        bonded[b].append(a)
    colours = list(elements)
    for _ in range(len(elements).bit_length() + 2):
        colours = [digest([colours[i], sorted(colours[k] for k in near)]) for i, near in enumerate(bonded)]
    return {
        "formula": "".join(f"{symbol}{n if n > 1 else ''}" for symbol, n in sorted(counts.items())),
        "graph": digest(sorted(colours)),
        "order": digest([list(elements), sorted(sorted(map(int, pair)) for pair in bonds)]),
        "handedness": "".join("+" if sign > 0 else "-" for sign in handedness),
    }


def openmm_digest(xml: str) -> str:
    """Of everything in a serialized OpenMM System that its energy depends on: not of masses, versions and names.

    Terms that name their atoms may come in any order, and numbers count to nine digits.
    """
    root = ElementTree.fromstring(xml)
    found = (root.find(part) for part in ("Constraints", "Forces"))
    parts = [_canonical(part) for part in found if part is not None]
    return digest([len(root.findall("Particles/Particle")), *parts])


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> dict[str, str]:
    """In words, by entry, how data of ``there`` differ from those of ``here``; entries that one has not are skipped.

    Names decide nothing, those of force-field files neither where the parameters are known to be equal.
    """
    told: dict[str, str] = {}
    for key in [*_WORDS, *(key for key in here if key not in _WORDS)]:
        renamed = key == "force_field" and "openmm" in here and there.get("openmm") == here["openmm"]
        if key == "name" or renamed or key not in there or key not in here or _equal(there[key], here[key]):
            continue
        if set(told) & set(_DECIDES) and key in _FOLLOWS:
            continue
        if isinstance(there[key], Mapping) and isinstance(here[key], Mapping):
            told |= differences(there[key], here[key])
        else:
            told[key] = _WORDS.get(key, partial(_otherwise, key))(there[key], here[key])
    return told


def _canonical(element: ElementTree.Element) -> list:
    attributes = {key: _number(value) for key, value in element.attrib.items() if key not in ("version", "name")}
    # names of parameters stand in expressions, and have no p1
    if "name" in element.attrib and element.tag != "Force":
        attributes["name"] = element.attrib["name"]
    children = [_canonical(child) for child in element]
    if element.tag == "Forces" or all("p1" in child.attrib for child in element):
        children.sort(key=json.dumps)
    return [element.tag, sorted(attributes.items()), children]


def _number(text: str) -> str:
    try:
        return f"{float(text) + 0.0:.{SIGNIFICANT}g}"
    except ValueError:
        return text


def _equal(there: Any, here: Any) -> bool:
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in (there, here))
    return math.isclose(there, here, rel_tol=1e-9) if numbers else there == here


def _otherwise(key: str, there: Any, here: Any) -> str:
    """Words for an entry without its own: lists are not told in full."""
    short = not any(isinstance(value, list | tuple) for value in (there, here))
    return f"another {key} ({there}, not {here})" if short else f"other {key}"


def _nm(cutoff: float | None) -> str:
    return "none" if cutoff is None else f"{cutoff:g} nm"


def _joined(files: Sequence[str]) -> str:
    return files if isinstance(files, str) else " + ".join(files)
