"""Terms of a force field: a class for each OpenMM force, ``Term(force, n_atoms)(geometry) -> (batch,)`` in kJ/mol."""

from boltznce.systems.terms.bonded import (
    CMAPTorsions,
    HarmonicAngles,
    HarmonicBonds,
    HarmonicTorsions,
    PeriodicTorsions,
    RyckaertBellemansTorsions,
)
from boltznce.systems.terms.geometry import Geometry, Term, unknown
from boltznce.systems.terms.nonbonded import Nonbonded
from boltznce.systems.terms.solvation import GBSAOBC, CustomGB

__all__ = [
    "GBSAOBC",
    "CMAPTorsions",
    "CustomGB",
    "Geometry",
    "HarmonicAngles",
    "HarmonicBonds",
    "HarmonicTorsions",
    "Nonbonded",
    "PeriodicTorsions",
    "RyckaertBellemansTorsions",
    "Term",
    "unknown",
]
