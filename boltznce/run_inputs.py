"""What a run is made from: the files that its config names, copied into its folder, and what in a config decides.

In ``config.yaml`` a copied file stands by its path from the run's folder, ``inputs/...``: it is the same file when the
run is opened from elsewhere, or has been moved, or the original has changed. Folders of data stand by absolute paths.
"""

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from omegaconf import OmegaConf

from boltznce.errors import UserError
from boltznce.io import atomic_file, file_digest
from boltznce.records import as_dict
from boltznce.settings import leaves
from boltznce.systems.force_field_files import with_included
from boltznce.systems.structures import STRUCTURES, structure_file

__all__ = [
    "INPUTS",
    "changed_settings",
    "copy_inputs",
    "evaluated_otherwise",
    "keep_inputs",
    "open_inputs",
    "replaced_inputs",
    "with_changes",
]

INPUTS = "inputs"
FILES = ("flow.start", "ebm.start", "flow.published_weights")  # and system.structure, system.forcefield
FOLDERS = ("data.folder", "data_dir")
# settings, and sections of them, by which no result changes
HARMLESS = (
    "checkpoint_every",
    "compile",
    "data_dir",
    "device",
    "devices",
    "logger",
    "minimize",
    "n_processes",
    "n_workers",
    "num_nodes",
    "progress",
    "strategy",
    "threads",
)

# settings of ``evaluation`` that the report alone reads, which is made anew whenever a run goes on
OF_THE_REPORT = ("n_bootstrap", "confidence", "n_torus", "tica_lag", "grid")

Config = dict[str, Any]


def keep_inputs(config: Config) -> dict[str, Path]:
    """Put the paths of copies in place of a resolved config's files; returns where each copy comes from.

    Raises UserError for a force-field file that includes one from outside its folder.
    """
    sources: dict[str, Path] = {}
    for section, key, name in _paths(config):
        value = section[key]
        if name in FOLDERS:
            section[key] = str(Path(value).absolute())
            continue
        source = structure_file(value) if name == "system.structure" else Path(value).expanduser()
        if source is None or source.is_relative_to(STRUCTURES) or not source.is_file():
            continue
        folder = PurePosixPath(INPUTS, name)
        section[key] = str(folder / source.name)
        if name.startswith("system.forcefield"):
            files = with_included(source.absolute(), source.name)
            sources |= {str(folder / inside): path for inside, path in files.items()}
        else:
            sources[section[key]] = source.absolute()
    return sources


def copy_inputs(folder: Path, sources: Mapping[str, Path]) -> None:
    """Copy files to their places in a run's folder, each whole or not at all."""
    for place, source in sources.items():
        if source != (folder / place).absolute():
            with atomic_file(folder / place) as temporary:
                shutil.copyfile(source, temporary)


def replaced_inputs(folder: Path, sources: Mapping[str, Path]) -> list[str]:
    """The sources whose contents are not those of the copies that a run's folder has."""
    copied = {place: source for place, source in sources.items() if (folder / place).is_file()}
    return [str(source) for place, source in copied.items() if file_digest(folder / place) != file_digest(source)]


def open_inputs(config: Config, folder: Path) -> Config:
    """The config of a run's folder with the paths of its own files made absolute, in place."""
    for section, key, name in _paths(config):
        if name not in FOLDERS and str(section[key]).startswith(f"{INPUTS}/"):
            section[key] = str((folder / section[key]).absolute())
    return config


def changed_settings(recorded: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Setting -> (recorded, given), of those that a result depends on."""
    there, here = dict(leaves(recorded)), dict(leaves(given))
    names = [name for name in {**there, **here} if not _harmless(name)]
    return {name: (there.get(name), here.get(name)) for name in names if there.get(name) != here.get(name)}


def with_changes(config: Config, given: Mapping[str, Any]) -> Config:
    """A run's config with other values of settings by which nothing changes that was trained.

    Raises UserError for others.
    """
    free = [name for name in HARMLESS if name not in FOLDERS]
    refused = [name for name in given if set(free).isdisjoint(name.split(".")) and not name.startswith("evaluation.")]
    if refused:
        raise UserError(
            f"resume= goes on with the run's own settings, of which evaluation.* may change, and {', '.join(free)}: "
            f"leave out {' '.join(refused)}, or start a new run."
        )
    changed = OmegaConf.create(config)
    for name, value in given.items():
        OmegaConf.update(changed, name, value, merge=False, force_add=True)
    return as_dict(changed)


def evaluated_otherwise(before: Mapping[str, Any], after: Mapping[str, Any]) -> bool:
    """Whether what is drawn to be reported on is no longer what it was."""
    changed = changed_settings(before, after)
    return any(name.startswith("evaluation.") and name.split(".")[1] not in OF_THE_REPORT for name in changed)


def _harmless(name: str) -> bool:
    return not set(HARMLESS).isdisjoint(name.split("."))


def _paths(config: Config) -> Iterator[tuple[Any, Any, str]]:
    """Where in a config paths of files and folders may stand: what holds each, its key there, the setting's name."""
    for name in ("system.structure", *FILES, *FOLDERS):
        *sections, key = name.split(".")
        holder: Any = config
        for section in sections:
            holder = holder.get(section) if isinstance(holder, dict) else None
        if isinstance(holder, dict) and isinstance(holder.get(key), str):
            yield holder, key, name
    files = (config.get("system") or {}).get("forcefield")
    if isinstance(files, list):
        for k, file in enumerate(files):
            if isinstance(file, str):
                yield files, k, f"system.forcefield.{k}"
