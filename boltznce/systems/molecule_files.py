"""A molecule as files: a structure, a serialized OpenMM System, and a config that names both."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mdtraj
import numpy as np
import openmm
import yaml

from boltznce.folders import Kind, claim
from boltznce.io import atomic_file
from boltznce.systems.structures import read_structure
from boltznce.topologies import pdb_text

__all__ = ["save_molecule"]


def save_molecule(
    folder: Path,
    name: str,
    topology: mdtraj.Topology,
    positions: np.ndarray,
    system: openmm.System,
    settings: Mapping[str, Any],
) -> Path:
    """The config of a `MolecularSystem` with these ``settings``, beside the files that it names by absolute paths.

    Raises UserError for a folder with other files, and for a topology that a PDB file cannot hold.
    """
    claim(folder, Kind("this molecule", names=rf"{re.escape(name)}\.(pdb|xml|yaml)"))
    structure, forces, config = (folder.absolute() / f"{name}.{suffix}" for suffix in ("pdb", "xml", "yaml"))
    contents = {
        "_target_": "boltznce.systems.molecular.MolecularSystem",
        "name": name,
        "structure": str(structure),
        "forcefield": [str(forces)],
        **_plain(settings),
    }
    texts = {
        structure: pdb_text(topology, positions),
        forces: openmm.XmlSerializer.serialize(system),
        config: yaml.safe_dump(contents, sort_keys=False, allow_unicode=True),
    }
    for path, text in texts.items():
        with atomic_file(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    read_structure(structure)
    return config


def _plain(value: Any) -> Any:
    """Mappings and sequences of any kind as those that YAML has."""
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, list | tuple) else value
