"""The methods, by name. A method is a module with

``STAGES``: name -> function of a `Workspace`, in order;
``summary``: of a `Workspace`, the report in a few lines;
``load_models``: of a run's folder, config, system and device, the trained models to draw from (`drawing.Models`).
"""

import importlib
from types import ModuleType

from boltznce.errors import UserError

__all__ = ["METHODS", "find_method"]

METHODS = {
    name: f"boltznce.methods.{name}"
    for name in ("boltznce", "boltznce_transfer", "density", "finetune", "forward_kl", "reverse_kl", "tabg", "tbg")
}


def find_method(name: str) -> ModuleType:
    """The module of a method; raises UserError that lists the known ones."""
    if name not in METHODS:
        raise UserError(f"Unknown method {name!r}: choose one of {', '.join(METHODS)}.")
    return importlib.import_module(METHODS[name])
