"""What can be known of a run before its first stage, in a second: a mistake is told here, and not after hours of work.

`preflight` asks what every run needs, then the method's own ``check(config, system)``, if it has one, which is put
together from the other functions of this file.
"""

import importlib.util
from pathlib import Path
from types import ModuleType

import torch
from omegaconf import DictConfig, OmegaConf

from boltznce.command_line import command_line
from boltznce.config import build, locate
from boltznce.data.dataset import check_shares, mode_balanced_indices
from boltznce.data.jobs import jobs_of
from boltznce.data.members import load_data, simulation_settings
from boltznce.data.packed import packed_path
from boltznce.errors import UserError
from boltznce.flows.solvers import SolverSettings
from boltznce.io import require_writable
from boltznce.logger import open_logger
from boltznce.methods.models import MODELS, load_trained, make
from boltznce.methods.proxy import FromProxy
from boltznce.methods.refinement import settings_of
from boltznce.methods.workspace import make_fabric
from boltznce.precision import ordinary_tensors
from boltznce.settings import check, require_keywords
from boltznce.smc import AnnealSettings
from boltznce.systems.base import System
from boltznce.training import FitSettings, check_fit

__all__ = [
    "check_comparison",
    "check_ebm",
    "check_evaluation",
    "check_fit_of",
    "check_flow",
    "check_refinement",
    "check_training_data",
    "needs_data",
    "preflight",
]


@ordinary_tensors()
def preflight(config: DictConfig) -> None:
    """Raise UserError for whatever would end a run with this config later on: of a system, a method, its settings."""
    from boltznce.analysis import plotting  # slow to import, and only runs need it

    check(config)
    require_keywords(open_logger, config.logger, "logger")
    with plotting.style((config.get("figures") or {}).get("style")):
        pass  # there is one of this name
    shared = {name: config[name] for name in ("devices", "num_nodes", "strategy") if name in config}
    make_fabric(config.device, config.precision, **shared)
    method = locate(config.method._target_, ModuleType)
    system = build(config.system)
    system.example  # noqa: B018  a family makes its members when they are asked for
    own = vars(method).get("check")
    if own is not None:
        own(config, system)


# ---- data -----------------------------------------------------------------------------------------------------------


def check_training_data(config: DictConfig, system: System) -> None:
    """Data to train on: those that are there, or that they can be made."""
    section = config.data
    if section.folder is None or section.split is None:
        raise UserError(
            f"method={config.method.name} trains on data: set data.folder, and data.split to shares for train, "
            "validation and test."
        )
    missing = _missing(config, system)
    require_keywords(check_shares, section.split, "data.split")
    check_shares(**section.split)
    if not missing or not needs_data(config, system):
        return
    require_writable(Path(section.folder))
    if section.get("packed") is not None:
        packed_path(section.packed)
    if section.simulation is None:
        if not system.example.cheap.exact:
            raise UserError(f"{section.folder} has no data of {missing[0]}: set data.simulation, how to simulate it.")
        if section.get("n_samples") is None:
            raise UserError("data.n_samples is missing: set how many exact draws to train on.")
        return
    given = OmegaConf.to_container(section.simulation, resolve=True)
    of_tests = given.pop("test", None) or {}
    given.pop("n_processes", None)
    for more in (given, given | of_tests):
        require_keywords(jobs_of, more := simulation_settings(system, more), "data.simulation")
        jobs_of(system.example, **more)


def needs_data(config: DictConfig, system: System) -> bool:
    """Whether there have to be data: to train on, or as it is said how to simulate, or draw, those to compare with."""
    return bool(config.flow.fit.steps or config.data.simulation is not None or system.example.cheap.exact)


def check_comparison(config: DictConfig, system: System) -> None:
    """Data that nothing is trained on: none, or a dataset."""
    section = config.data
    if section.folder is not None:
        _missing(config, system)
    if section.split is not None:
        require_keywords(check_shares, section.split, "data.split")
        check_shares(**section.split)
    check_refinement(config, system)


def _missing(config: DictConfig, system: System) -> list[str]:
    """Names of members without data. Raises UserError for folders that are no datasets, and for data of others."""
    folder, missing = Path(config.data.folder), []
    for label in system.labels:
        place = folder / label
        if (place / "meta.yaml").exists():
            continue
        if place.exists() and (not place.is_dir() or any(place.iterdir())):
            raise UserError(
                f"{place} is no dataset, it has no meta.yaml: set data.folder to one, or to a folder that is not there "
                f"({command_line('import')} makes a dataset of trajectories)."
            )
        missing.append(label or system.name)
    if not missing and not system.is_family:  # those of a family are many, and looked at by its first stage
        load_data(system, system, folder)
    return missing


# ---- models ---------------------------------------------------------------------------------------------------------


def check_flow(config: DictConfig, system: System) -> None:
    """An interpolant flow: its network, its training, its solver, and what of the state is made frequent."""
    section = config.flow
    _check_model(config, system, "flow")
    for name, solver in (("flow.solver", section.solver), ("evaluation.solver", config.evaluation.solver)):
        require_keywords(SolverSettings, solver, name)
        SolverSettings(**solver)
    state = system.example.state
    if not section.balance or state is None:
        return
    require_keywords(mode_balanced_indices, section.balance, "flow.balance")
    if not system.example.along_an_angle:
        if any(section.balance.get(key) is not None for key in ("kappa", "mu")):
            raise UserError(
                "kappa and mu of flow.balance are of a state along an angle, and "
                f"{system.example.state_in_words()} is along none: set flow.balance={{c: auto}}, or null."
            )
        return
    if section.balance.get("mu") is None:
        _ = state.centre


def check_ebm(config: DictConfig, system: System) -> None:
    """An EBM: its network, its training, and, for a regression, likelihoods to regress onto."""
    _check_model(config, system, "ebm")
    section = config.ebm
    if not section.get("regression_weight"):
        return
    if section.padded:
        raise UserError(
            "The regression needs batches of one molecule: set ebm.padded=false or ebm.regression_weight=0."
        )
    if config.samples.likelihood == "none":
        raise UserError(
            "The regression needs likelihoods: set samples.likelihood=hutchinson or exact, or ebm.regression_weight=0."
        )


def check_fit_of(section: DictConfig, name: str, validates: bool) -> None:
    """A training by ``section.fit`` (of a flow or an EBM none, if it has no steps)."""
    require_keywords(FitSettings, section.fit, f"{name}.fit")
    if section.fit.steps or "start" not in section:
        check_fit(FitSettings(**section.fit), name, validates)


def check_evaluation(config: DictConfig, system: System) -> None:
    """What the report needs."""
    if not system.members("test"):
        raise UserError(
            f"Selection {system.selection!r} of {system.name} has no peptide to be tested, and a report is of these: "
            "name one in its list test."
        )
    check_refinement(config, system)
    if config.evaluation.get("tica_lag") and importlib.util.find_spec("deeptime") is None:
        raise UserError('TICA needs deeptime: pip install "boltznce[tica]", or set evaluation.tica_lag=null.')


def check_refinement(config: DictConfig, system: System) -> None:
    """How draws are annealed to the target, and from what."""
    if not config.evaluation.get("refine"):
        if system.example.proxy is not None:
            raise UserError(
                f"Only refinement leads from the proxy of {system.example.name} to its own energy: set "
                "evaluation.refine, of method=boltznce or tabg."
            )
        if config.evaluation.get("frames") == "refined":
            raise UserError(
                "evaluation.frames=refined needs refined walkers: set evaluation.refine, or evaluation.frames=data."
            )
        return
    given = dict.fromkeys(config.evaluation.refine)
    if "n_walkers" not in given:
        raise UserError(
            "evaluation.refine.n_walkers is missing: set how many draws to refine, or evaluation.refine=null."
        )
    require_keywords(AnnealSettings, set(given) - {"n_walkers", "from_proxy"}, "evaluation.refine")
    require_keywords(FromProxy, config.evaluation.refine.get("from_proxy") or {}, "evaluation.refine.from_proxy")
    settings_of(config)
    if not ("ebm" in config or "generator" in config):
        raise UserError(
            f"A flow of method={config.method.name} has no likelihood with a cheap gradient for a refinement to begin "
            "with: set evaluation.refine=null, or method=boltznce."
        )


def _check_model(config: DictConfig, system: System, name: str) -> None:
    """Made, untrained, and its network called with two points: what does not fit together is told now."""
    section, member = config[name], system.example
    check_fit_of(section, name, validates=True)
    require_keywords(MODELS[name], section.model, f"{name}.model")
    for key in ("start", "published_weights"):
        if section.get(key) and not Path(section[key]).is_file():
            raise UserError(f"{name}.{key}={section[key]} is no file: give one of weights, or null.")
    target, x = section.network._target_, member.positions.expand(2, -1, -1)
    try:
        with torch.random.fork_rng(), torch.no_grad():
            model = make(OmegaConf.merge(config, {"compile": False}), system, name)
            own = model.unscaled(member).eval()
            given = own.network(x / own.length_scale, torch.tensor([0.5, 0.6]), own.features).shape
    except UserError:
        raise
    except Exception as error:
        if not target.startswith("boltznce."):  # of the user's own, who wants the trace
            raise
        raise UserError(f"{name}.network={target} with these settings is not for {system.name}: {error}.") from error
    if given != (x.shape if name == "flow" else x.shape[:1]):
        kind = "a vector field" if name == "flow" else "an energy"
        raise UserError(
            f"{name}.network={target} gives {tuple(given)} for positions {tuple(x.shape)}: choose {kind}, which the "
            f"{name} needs."
        )
    if name == "flow":
        pairs = own.couple(x, x.clone())
        if [part.shape for part in pairs] != [x.shape, x.shape]:
            raise UserError(
                f"flow.model.coupling gives {[tuple(part.shape) for part in pairs]} for two sets of positions "
                f"{tuple(x.shape)}: return pairs of the same shapes."
            )
    if section.get("start"):
        load_trained(model, Path(section.start))
