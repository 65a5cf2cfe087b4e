"""Names to settings to objects: where the configs are, what they offer, and what comes out of one."""

import inspect
import re
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationToMissingValueError, MissingMandatoryValue, OmegaConfBaseException
from torch import nn

from boltznce.errors import UserError
from boltznce.precision import ordinary_tensors
from boltznce.records import as_dict, read_settings
from boltznce.settings import check
from boltznce.systems.base import System
from boltznce.systems.family import PeptideFamily
from boltznce.systems.peptides import looks_like_sequence, parse_sequence
from boltznce.trust import check_trusted, locate

__all__ = ["available", "build", "compose", "config_dir", "explain", "load_system", "locate", "normalize"]

PATHS = ("resume", "run", "output", "peptide")  # overrides that are one text, a path of a folder or a sequence
# paths of which a sweep may have several
MORE_PATHS: tuple[str, ...] = ("data_dir", "data.folder", "samples", "flow.start", "ebm.start")
MORE_PATHS += ("flow.published_weights", "system.structure", "hydra.run.dir", "hydra.sweep.dir")
MORE_PATHS += ("files", "topology", "weights", "bias", "energies")
LISTED = {"samples": "{", "files": "["}  # that may be more than a path, which then begins with this
# sections that are lists of the user's choice: an entry may be taken away, where a setting may not
LISTS: tuple[str, ...] = ("~hydra", "~system.", "~energy.molecules.", "~network.networks.", "~spline.flows.")
LISTS += ("~likelihood.solvers.", "~free_energy.simulations.")
# sections whose settings are keywords of a class or a function, not all of which stand in the configs: + adds one
KEYWORDS = {"system", "network", "networks", "flows", "molecules", "model", "coordinates", "fit", "solver", "balance"}
KEYWORDS |= {"simulation", "split", "settings", "logger", "hydra", "solvers", "simulations", "finest", "hutchinson"}
SYSTEMS = (System, PeptideFamily)


def config_dir() -> Path:
    """The folder of the configs: inside the installed package, or at the top of the repository."""
    package = Path(__file__).parent
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def available(group: str = "") -> list[str]:
    """Names of the configs in a group such as ``system``; those at the top by default.

    >>> available("budget"), "tabg/aldp" in available("experiment")
    (['cpu', 'gpu', 'long', 'paper', 'smoke'], True)
    """
    folder = config_dir() / group
    paths = list(folder.glob("*.yaml")) or folder.glob("*/*.yaml")
    return sorted(path.relative_to(folder).with_suffix("").as_posix() for path in paths)


def load_system(name: str | Path, /, *, trust: bool = False, **overrides: Any) -> System | PeptideFamily:
    """A system by its name in ``configs/system``, by the path of such a YAML file, or a peptide by its sequence.

    A file may name the library's classes and those that `boltznce.trust.register` was called on; with ``trust`` any,
    which is then imported, and so executed.

    ``AK`` is a peptide with charged ends, ``ACE-AAA-NME`` a capped one (see `boltznce.systems.peptides.build_peptide`).
    Both have the settings of ``configs/system/sequence/default.yaml``: amber14 with OBC1 implicit solvent at 310 K.
    Keywords replace settings:

    >>> load_system("gaussians8", std=0.2).temperature
    1.0
    >>> load_system("AK").n_atoms
    35

    Raises UserError for names and settings that do not exist, for a sequence that cannot be built, and for a file that
    names what is foreign.
    """
    settings: Any = _own_system(str(name), trust) if str(name) not in available("system") else None
    if settings is None:
        path = config_dir() / "system" / f"{name}.yaml"
        if not path.is_file():
            raise UserError(
                f"Unknown system {str(name)!r}: choose one of {', '.join(available('system'))}, "
                "or give the path of a system's YAML file or the sequence of a peptide, as AK or ACE-AAA-NME."
            )
        settings = OmegaConf.load(path)
    settings.pop("defaults", None)  # its kind, which the settings of a training depend on
    return build(settings, SYSTEMS, **overrides)


def _own_system(name: str, trust: bool) -> DictConfig | None:
    """Settings of a system that is not in ``configs``: those of a file, or of a peptide by its sequence; else None.

    Raises UserError for a sequence that cannot be built, and for a file that names what is foreign.
    """
    path = Path(name).expanduser()
    if path.suffix in (".yaml", ".yml") and path.is_file():
        settings = read_settings(path, "give a system's YAML file, as those of configs/system")
        if not trust:
            check_trusted(as_dict(settings), path)
        return settings
    if not looks_like_sequence(name):
        return None
    try:
        letters, _ = parse_sequence(name)
    except UserError as error:
        systems = ", ".join(available("system"))
        raise UserError(f"Unknown system {name!r}: {error} Systems that have a name are {systems}.") from None
    of_sequence: Any = OmegaConf.load(config_dir() / "system" / "sequence" / "default.yaml")
    of_sequence.structure = name
    if not letters:  # the caps alone have no φ
        of_sequence.state = None
    return of_sequence


def build(
    settings: Mapping[str, Any] | DictConfig,
    kind: type | tuple[type, ...] | None = None,
    offered: Mapping[str, Any] | None = None,
    **overrides: Any,
) -> Any:
    """Call ``_target_``, a class of ``kind``, with its other keys as keywords; its own errors come through unwrapped.

    Of ``offered`` (n_atoms, dim, n_features, bonds of a network) it gets those that it asks for and ``settings`` lack.
    ``kind`` is by default that of a system, a family or a network.

    >>> build({"_target_": "boltznce.networks.mlp.MLPEnergy", "width": 8}, offered={"dim": 3}).__class__.__name__
    'MLPEnergy'

    Raises UserError for another kind of target, and for keywords that it does not have or that are missing.
    """
    given: Any = OmegaConf.to_container(settings, resolve=True) if OmegaConf.is_config(settings) else settings
    settings = {**given, **overrides}
    target = settings.pop("_target_", None)
    if target in (None, "???"):
        raise UserError("A config of something to be built needs the key _target_, the Python path of its class.")
    factory = locate(target, kind or (*SYSTEMS, nn.Module))
    signature = inspect.signature(factory)
    settings = {key: value for key, value in (offered or {}).items() if key in signature.parameters} | settings
    try:
        signature.bind(**settings)
    except TypeError as error:
        names = ", ".join(signature.parameters)
        raise UserError(f"{factory.__name__} cannot be built: {error}; its settings are {names}.") from error
    with ordinary_tensors():
        return factory(**settings)


def normalize(overrides: Sequence[str], default_budget: str | None = None) -> list[str]:
    """Overrides whose values Hydra reads as they are meant.

    Paths of folders are quoted, and so are sequences, which may be spelled like numbers (``NAN``, ``INF``); a
    system's file or sequence becomes a choice of Hydra's, as if it were in ``configs/system``. ``budget=`` is set to
    the default where neither it nor an experiment, which has one, is given. A ``+`` adds what something reads, and
    nothing else: elsewhere it is taken off, so that a setting has to be there.

    >>> normalize(["system=NAN,aldp", "resume=outputs/seed=1,threads=1"], default_budget="cpu")
    ["system='NAN',aldp", "resume='outputs/seed=1,threads=1'", 'budget=cpu']

    Raises UserError for a sequence that cannot be built.
    """
    trust, one = "trust=true" in map(str.lower, overrides), not {"-m", "--multirun"} & set(overrides)
    words = [_normalized(word, trust, PATHS + MORE_PATHS * one) for word in overrides]
    if not any(word.startswith("method._target_=") for word in words):  # of a user's method, which reads what it will
        words = [word if _may_add(word) else word.lstrip("+") for word in words]
    if default_budget and not {"budget", "experiment"} & {word.partition("=")[0] for word in words}:
        words.append(f"budget={default_budget}")
    return words


def _normalized(word: str, trust: bool, paths: Sequence[str]) -> str:
    key, _, value = word.partition("=")
    if key.startswith("~") and not key.startswith(LISTS):
        raise UserError(f"{key} takes a setting away, which there must be: set it to null or to another value.")
    if key in paths and value not in ("", "null") and value[0] != LISTED.get(key):
        return f"{key}={quoted(unquoted(value))}"
    if re.fullmatch(r"null|true|false|[-+.]?\d[^,]*", value) and available(key.lstrip("+").partition("@")[0]):
        return f"{key}={quoted(value)}"  # a choice of configs has a name: this is none, and is told so
    if key == "system" and not value.endswith(")"):  # choice(...), glob(...)
        names = [value] if Path(value).is_file() else re.findall(r"'[^']*'|\"[^\"]*\"|[^,]+", value)
        return f"{key}={','.join(_offered(name, trust) for name in names)}"
    return word


def _may_add(word: str) -> bool:
    """Whether a + before an override adds a choice of configs, or a keyword."""
    key = word.partition("=")[0].lstrip("+")
    return "@" in key or bool(KEYWORDS & set(key.split("."))) or bool(available(key))


def _offered(word: str, trust: bool) -> str:
    """The name of a system as Hydra reads it, a choice of Hydra's from now on."""
    name = unquoted(word)
    settings = _own_system(name, trust) if name not in available("system") else None
    if settings is None:
        return word
    if not looks_like_sequence(name):
        path = Path(name).expanduser().resolve()
        name = f"{path.stem}-{zlib.crc32(str(path).encode()):08x}"  # may have the name of another one
    ConfigStore.instance().store(group="system", name=name, node=settings)
    return quoted(name)


def quoted(value: str) -> str:
    """A value for Hydra that is nothing but this text: backslashes count only before a quote and at the end."""
    return "'" + re.sub(r"(\\*)('|$)", lambda at: 2 * at[1] + ("\\'" if at[2] else ""), value) + "'"


def unquoted(value: str) -> str:
    """The text of a value that may stand in quotes."""
    in_quotes = len(value) > 1 and value[0] == value[-1] and value[0] in "\"'"
    if not in_quotes:
        return value
    escaped = rf"(\\*)(\\{value[0]}|$)"
    return re.sub(escaped, lambda at: at[1][: len(at[1]) // 2] + at[2][1:], value[1:-1])


def compose(config_name: str, overrides: Sequence[str] = ()) -> DictConfig:
    """Compose ``configs/<config_name>.yaml`` with overrides as on the command line.

    >>> compose("train", ["system=gaussians8", "seed=7"]).flow.model.coupling
    'independent'

    Raises UserError, listing what exists, for a choice or a key that does not, and for a value that makes no sense.
    """
    words = normalize(overrides)
    try:
        with hydra.initialize_config_dir(version_base=None, config_dir=str(config_dir())):
            config = hydra.compose(config_name, overrides=words)
            check(config, config_name)
            return config
    except (HydraException, OmegaConfBaseException) as error:
        raise explain(error, words) from error


def explain(error: HydraException | OmegaConfBaseException, overrides: Sequence[str] = ()) -> UserError:
    """Hydra's complaint about a config as one sentence that says what exists."""
    text = str(error).strip().partition("\n")[0]
    if isinstance(error, MissingConfigException):
        group, _, choice = (error.missing_cfg_file or "").removesuffix(".yaml").rpartition("/")
        if group.startswith("size/"):
            _, method, kind = group.split("/")
            return _no_size(method, kind, choice, overrides)
        if group.startswith("hydra/"):
            return UserError(f"{group}={choice} is not installed: pip install 'boltznce[hpc]' brings it.")
        names = ", ".join(available(group)) or "none"
        sequence = ", or the sequence of a peptide, as AK or ACE-AAA-NME" if group == "system" else ""
        return UserError(f"Unknown {group or 'config'} {choice!r}: choose one of {names}{sequence}.")
    if isinstance(error, OverrideParseException):
        return UserError(f"{error.override!r} cannot be read: write key=value, with quotes around special characters.")
    if isinstance(error, MissingMandatoryValue | InterpolationToMissingValueError):
        key = (isinstance(error, MissingMandatoryValue) and error.full_key) or text.rpartition(" ")[2]
        return UserError(f"{key}= is missing: add {key}=... to the command line.")
    return UserError(f"{text} Check its spelling: --cfg job prints every setting there is.")


def _no_size(method: str, kind: str, budget: str, overrides: Sequence[str]) -> UserError:
    system = next((word for word in overrides if word.startswith("system=")), "the system")
    sizes = ", ".join(name for name in available(f"size/{method}") if not name.endswith("/default")) or "none"
    return UserError(
        f"method={method} has no size for {system} (a {kind}) with budget={budget}: configs/size/{method} has {sizes}."
    )
