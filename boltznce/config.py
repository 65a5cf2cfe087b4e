"""Names to settings to objects: where the configs are, what they offer, and how a system comes out of one."""

import importlib
import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from boltznce.errors import UserError
from boltznce.systems.base import System
from boltznce.systems.peptides import looks_like_sequence, parse_sequence

__all__ = ["available", "build", "compose", "config_dir", "explain", "fit_budget", "load_system", "offer_sequences"]


FAMILY_METHODS = {"tbg": "tbg", "boltznce": "boltznce_transfer"}  # what a method is called where the system is a family of molecules


def config_dir() -> Path:
    """The folder of the configs: inside the installed package, or at the top of the repository."""
    package = Path(__file__).parent
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def available(group: str = "") -> list[str]:
    """Names of the configs in a group such as ``system``; those at the top by default."""
    return sorted(path.stem for path in (config_dir() / group).glob("*.yaml"))


def load_system(name: str | Path, /, **overrides: Any) -> System:
    """A system by its name in ``configs/system``, by the path of such a YAML file, or a peptide by its sequence; keywords replace settings.

    ``AK`` is a peptide with charged ends, ``ACE-AAA-NME`` a capped one (see `boltznce.systems.peptides.build_peptide`). Both have the
    settings of ``configs/system/sequence/default.yaml``: amber14 with OBC1 implicit solvent at 310 K.

    Raises UserError for a name that does not exist, a sequence that cannot be built and settings that the system does not have.
    """
    shipped = config_dir() / "system" / f"{name}.yaml"
    path = shipped if shipped.is_file() else Path(name).expanduser()
    if path.suffix in (".yaml", ".yml") and path.is_file():
        return build(OmegaConf.load(path), **overrides)
    if looks_like_sequence(str(name)):
        return build(_sequence_config(str(name)), **overrides)
    raise UserError(
        f"Unknown system {str(name)!r}: choose one of {', '.join(available('system'))}, "
        "or give the path of a system's YAML file or the sequence of a peptide, as AK or ACE-AAA-NME."
    )


def offer_sequences(overrides: Sequence[str]) -> None:
    """Make ``system=AK`` a choice of Hydra's, as if it had a file in ``configs/system``; raises UserError for what cannot be built."""
    for word in overrides:
        key, _, names = word.partition("=")
        for name in names.split(",") if key == "system" else ():
            if looks_like_sequence(name) and name not in available("system"):
                ConfigStore.instance().store(group="system", name=name, node=_sequence_config(name))


def _sequence_config(sequence: str) -> DictConfig:
    try:
        parse_sequence(sequence)
    except UserError as error:
        raise UserError(f"Unknown system {sequence!r}: {error} Systems that have a name are {', '.join(available('system'))}.") from None
    config = OmegaConf.load(config_dir() / "system" / "sequence" / "default.yaml")
    config.structure = sequence
    return config


def fit_budget(overrides: Sequence[str]) -> list[str]:
    """Overrides of ``train`` with the budget that fits method and system: ``budget=cpu`` may become ``budget=plane/cpu``.

    A folder ``configs/budget/<method>`` has the budgets of a method, its ``plane`` those for systems in the plane; ``configs/budget``
    itself has those of BoltzNCE, ``configs/budget/plane`` for the plane; ``configs/budget/transfer`` those for families of molecules, for
    which ``method=boltznce`` becomes ``boltznce_transfer``. Where a folder has one of the system's name, as
    ``configs/budget/tabg/hexapeptide``, its files come first. An experiment without a budget on the command line keeps its own.

    Raises UserError for a method that is not for the system.
    """
    overrides = _fit_method(overrides)
    folder = _budget_folder(overrides)
    if folder is None:
        return list(overrides)
    given = [word.partition("=")[0] for word in overrides]
    words = list(overrides) if "budget" in given or "experiment" in given else [*overrides, "budget=cpu"]
    for i, word in enumerate(words):
        key, _, names = word.partition("=")
        if key == "budget":
            folders = [f"{folder}/{_chosen('system', overrides)}", folder]
            words[i] = "budget=" + ",".join(_fitting(name, folders) for name in names.split(","))
    return words


def _fitting(name: str, folders: Sequence[str]) -> str:
    """The budget called ``name`` of the first folder that has one."""
    fitting = (f"{folder}/{name}" for folder in folders if (config_dir() / "budget" / folder / f"{name}.yaml").is_file())
    return next(fitting, name)


def _fit_method(overrides: Sequence[str]) -> list[str]:
    """The overrides with the method's form for many molecules where the system is a family of them."""
    words = list(overrides)
    method, system = _chosen("method", overrides) or "boltznce", _chosen("system", overrides) or ""
    if not _is_family(system):
        if method in FAMILY_METHODS.values():
            raise UserError(f"method={method} is for many molecules: set system=dipeptides, or choose another method.")
        return words
    if method not in {*FAMILY_METHODS, *FAMILY_METHODS.values()}:
        raise UserError(f"system={system} are many molecules, and method={method} is for one: choose {' or '.join(FAMILY_METHODS)}.")
    words = [word for word in words if not word.startswith("method=")]
    given = len(words) < len(overrides) or "experiment" not in [word.partition("=")[0] for word in words]
    return [*words, f"method={FAMILY_METHODS.get(method, method)}"] if given else words


def _budget_folder(overrides: Sequence[str]) -> str | None:
    method = _chosen("method", overrides) or ""
    if _is_family(_chosen("system", overrides) or ""):
        return "transfer"
    systems = (_chosen("system", overrides) or "").split(",")
    in_plane = all(_dimension(system) == 2 for system in systems)
    folder = config_dir() / "budget"
    if method and (folder / method).is_dir():
        return f"{method}/plane" if in_plane and (folder / method / "plane").is_dir() else method
    return "plane" if in_plane else None


def _chosen(group: str, overrides: Sequence[str]) -> str | None:
    """What the command line, or else the experiment that it names, chooses for a config group."""
    given = dict(word.split("=", 1) for word in overrides if "=" in word and not word.startswith("-"))
    experiment = config_dir() / "experiment" / f"{given.get('experiment')}.yaml"
    if group in given or not experiment.is_file():
        return given.get(group)
    choices = [entry for entry in OmegaConf.load(experiment).get("defaults", []) if not isinstance(entry, str)]
    return next((entry[f"override /{group}"] for entry in choices if f"override /{group}" in entry), None)


def _is_family(system: str) -> bool:
    path = config_dir() / "system" / f"{system}.yaml"
    return path.is_file() and getattr(_target(OmegaConf.load(path)._target_), "many", False)


def _dimension(system: str) -> int | None:
    path = config_dir() / "system" / f"{system}.yaml"
    return getattr(_target(OmegaConf.load(path)._target_), "dim", None) if path.is_file() else None


def _target(path: str) -> Any:
    module, _, attribute = path.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def build(config: Mapping[str, Any] | DictConfig, **overrides: Any) -> Any:
    """Call the config's ``_target_`` with its other keys as keywords; its own errors come through unwrapped.

    Raises UserError for keywords that the target does not have or that are missing.
    """
    settings = OmegaConf.to_container(config, resolve=True) if OmegaConf.is_config(config) else dict(config)
    settings.update(overrides)
    target = settings.pop("_target_", None)
    if target is None:
        raise UserError("A config of something to be built needs the key _target_, the Python path of its class.")
    factory = _target(target)
    signature = inspect.signature(factory)
    try:
        signature.bind(**settings)
    except TypeError as error:
        raise UserError(f"{factory.__name__} cannot be built: {error}; its settings are {', '.join(signature.parameters)}.") from error
    return factory(**settings)


def compose(config_name: str, overrides: Sequence[str] = ()) -> DictConfig:
    """Compose ``configs/<config_name>.yaml`` with overrides as on the command line.

    Raises UserError, listing what exists, for a choice or a key that does not.
    """
    offer_sequences(overrides)
    if config_name == "train":
        overrides = fit_budget(overrides)
    try:
        with hydra.initialize_config_dir(version_base=None, config_dir=str(config_dir())):
            return hydra.compose(config_name, overrides=list(overrides))
    except (HydraException, OmegaConfBaseException) as error:
        raise explain(error) from error


def explain(error: HydraException | OmegaConfBaseException) -> UserError:
    """Hydra's complaint about a config as one sentence that says what exists."""
    if isinstance(error, MissingConfigException):
        group, _, choice = (error.missing_cfg_file or "").removesuffix(".yaml").rpartition("/")
        names = ", ".join(available(group)) or "none"
        sequence = ", or the sequence of a peptide, as AK or ACE-AAA-NME" if group == "system" else ""
        return UserError(f"Unknown {group or 'config'} {choice!r}: choose one of {names}{sequence}.")
    if isinstance(error, OverrideParseException):
        return UserError(f"The override {error.override!r} cannot be read: write key=value, with quotes around special characters.")
    return UserError(f"{str(error).strip().splitlines()[0]} Check its spelling: --cfg job prints every setting there is.")
