"""A run: train one in its folder, load one, sample from it."""

import contextlib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from omegaconf import DictConfig, OmegaConf

from boltznce import processes, ranks
from boltznce.analysis.reweighting import WeightedSamples
from boltznce.analysis.samples_io import check_trajectory_format
from boltznce.command_line import command_line
from boltznce.config import compose, locate
from boltznce.folders import only_process
from boltznce.io import require_writable
from boltznce.logger import open_logger
from boltznce.methods import refinement
from boltznce.methods.drawing import Generator, choose_likelihood, draw_batches, draw_to_folder
from boltznce.methods.preflight import preflight
from boltznce.methods.workspace import Workspace, make_fabric
from boltznce.pretrained import folder_of
from boltznce.records import as_dict, damaged
from boltznce.run_folder import REMEDY, RunFolder
from boltznce.run_inputs import with_changes
from boltznce.settings import require
from boltznce.signals import Stopped, deferred
from boltznce.systems.base import System

if TYPE_CHECKING:  # slow to import
    from lightning_fabric import Fabric

__all__ = [
    "Run",
    "RunFolder",
    "help_train",
    "load_pretrained",
    "load_run",
    "refined_folder",
    "resume_folder",
    "start_folder",
    "train",
    "train_run",
]


def train_run(path: Path | str, *overrides: str) -> "Run":
    """Train a run in a folder, or finish the one that is there.

    ``overrides`` are those of ``boltznce train`` on the command line. UserError for settings that do not exist.

    >>> import tempfile
    >>> few = ["hot.fit.steps=2", "annealing.n_steps=1", "annealing.fit.steps=2", "annealing.n_draws=100"]
    >>> few += ["evaluation={n_samples: 200, n_ladder: 100, n_reference: 200, n_bootstrap: 20, n_torus: 50}"]
    >>> run = train_run(tempfile.mkdtemp(), "system=double_well", "method=tabg", "budget=smoke", *few)
    >>> run
    Run(..., tabg of double_well, smoke: hot, annealing, evaluation, report)
    >>> run.sample(5).positions.shape, "free_energy" in run.metrics
    ((5, 1, 2), True)
    """
    train(start_folder(Path(path), compose("train", overrides)))
    return Run(path, trust=True)


def start_folder(path: Path | str, config: DictConfig) -> RunFolder:
    """The folder of a new run with a composed config of ``train``, or of one that is to go on with it.

    Raises UserError, and makes none, for whatever `preflight` finds wrong with the config.
    """
    require_writable(Path(path))
    preflight(config)
    kept = [str(key) for key in config if key not in ("resume", "trust")]
    folder = RunFolder.create(Path(path), OmegaConf.masked_copy(config, kept), config.system.name)
    folder.checked = True
    return folder


def resume_folder(path: Path | str, given: Mapping[str, Any], trust: bool = False) -> RunFolder:
    """The folder of a run that is to go on, with other values of settings by which nothing changes that was trained.

    ``given`` has them by their dotted names. Raises UserError for others, as `RunFolder.open` does, and before anything
    is changed for what `preflight` finds wrong.
    """
    folder = RunFolder.open(Path(path), trust)
    folder.check_own()
    if given:
        preflight(OmegaConf.create(with_changes(as_dict(_config(folder)), given)))
        folder.change(given)
        folder.checked = True
    return folder


def train(folder: RunFolder) -> str:
    """Run, or finish, all stages of the method that the folder's config names; returns a summary for the terminal.

    The last stage, the report, is made anew of a finished run too: there may be data now to compare with. What can be
    known to fail is told as a UserError before the first stage (see `preflight`), and so is another process at work in
    the folder, and a run that ships with the package.

    With ``devices`` a process is started for each, unless they are there already (see `ranks.environment`): then each
    but the first calls `help_train`.
    """
    folder.check_own()
    try:
        with only_process(folder.path):
            config = _config(folder)
            if not folder.checked:
                preflight(config)
            if config.get("devices", 1) == 1 or ranks.environment():
                return _train(folder)
            processes.run(config.devices, help_train, folder.path, config, folder.trust)
            work = Workspace(folder, config, make_fabric("cpu"))
            return locate(config.method._target_, ModuleType).summary(work)
    except Stopped as stopped:
        stopped.how_to_go_on = command_line("train", f"resume={folder.path}")
        raise


def help_train(path: Path, config: DictConfig, trust: bool = False) -> None:
    """Be one of the processes that share the training of a run, whose folder the first has made when it joins."""
    ranks.join(fabric := _fabric(config))
    with contextlib.nullcontext() if ranks.is_first() else deferred():  # the others stop when the first does
        _train(RunFolder.open(path, trust), fabric)


def _train(folder: RunFolder, fabric: "Fabric | None" = None) -> str:
    from boltznce.analysis import plotting  # slow to import, and only runs need it

    config = _config(folder)
    set_threads(config.threads)
    method = locate(config.method._target_, ModuleType)
    fabric, logger = fabric or ranks.join(_fabric(config)), None
    if ranks.is_first():
        logger = open_logger(folder.path, as_dict(config), **config.logger)
    work = Workspace(folder, config, fabric, logger)
    ranks.by_first(folder.record_identity)(work.system)
    *_, last = method.STAGES
    style = plotting.style((config.get("figures") or {}).get("style"))
    with style, contextlib.closing(logger) if logger else contextlib.nullcontext():
        for name, stage in method.STAGES.items():
            if not ranks.by_first(_already_done)(folder, name, last):
                record: contextlib.AbstractContextManager[dict] = (
                    folder.stage(name) if ranks.is_first() else contextlib.nullcontext({})
                )
                with record as info:
                    info.update(stage(work) or {})
    return ranks.by_first(method.summary)(work)


def _already_done(folder: RunFolder, name: str, last: str) -> bool:
    done = name != last and folder.stage_done(name)
    if done:
        folder.check_left(name)
    return done


def _fabric(config: DictConfig) -> "Fabric":
    names = ("device", "precision", "devices", "num_nodes", "strategy")
    return make_fabric(**{name: config[name] for name in names if name in config})  # runs of before lack some


class Run:
    """A finished or interrupted training run: its system, its models and what can be drawn from them."""

    def __init__(self, path: Path | str, device: str = "auto", trust: bool = False, devices: int = 1):
        """See `load_run`; with ``devices`` this is one of so many processes that share its draws (`boltznce.ranks`)."""
        self.folder = RunFolder.open(Path(path), trust)
        self.config = _config(self.folder)
        self._work = Workspace(self.folder, self.config, ranks.join(make_fabric(device, devices=devices)))
        locate(self.config.method._target_, ModuleType)

    def __repr__(self) -> str:
        stages = ", ".join(f"{name}{'' if self.folder.stage_done(name) else ' (begun)'}" for name in self.folder.stages)
        what = f"{self.config.method.name} of {self.config.system.name}, {self.config.budget}"
        return f"Run({self.folder}, {what}: {stages})"

    @property
    def path(self) -> Path:
        """The run's folder."""
        return self.folder.path

    @property
    def system(self) -> System:
        """What the run samples, at its temperature; of a run of many molecules their family."""
        return self._work.system

    def generator(self, system: System | str | None = None) -> Generator:
        """What is drawn from, for BoltzNCE with ``flow`` and ``ebm``; ``system`` as for `sample`.

        Raises UserError before any is trained.
        """
        member = self.system.choose(system)
        return self._work.models.of(member)

    @property
    def metrics(self) -> dict:
        """The numbers of the run's report; raises UserError before there is one, and where they are damaged."""
        return self.folder.metrics

    def sample(
        self,
        n: int,
        likelihood: str = "auto",
        *,
        system: System | str | None = None,
        seed: int = 0,
        batch_size: int | None = None,
        n_probes: int = 1,
        refine: bool = False,
        folder: Path | str | None = None,
        format: str = "npy",
    ) -> WeightedSamples:
        """``n`` fresh samples with weights -u - log q; ``meta["counts"]`` tells how many were drawn for them.

        With ``refine`` they are annealed from their likelihood to the target, by the run's ``evaluation.refine``:
        weights that carry, minutes for thousands (see `boltznce.smc`; an EBM's error stays in ΔF). Samples with a
        common number in ``ancestors`` are not independent. Of a system with a proxy energies and weights are the
        proxy's, and only those of refined samples the system's; of these there are as many as
        ``evaluation.refine.from_proxy.n_walkers`` says.

        Args:
            likelihood: "ebm" (up to a constant), "exact", "hutchinson" (``n_probes`` probes; unbiased log q, biased
                weights) or "none"; "auto" is the method's own: "ebm" of BoltzNCE, "exact" of TA-BG, whose flow has
                nothing but that.
            system: what to sample, where the run is of many molecules: one of these, or one that it never saw, by its
                sequence ("KS") or as `load_system` makes it.
            seed: the same seed gives the same samples.
            folder: where to save them on the way, batch by batch: n is then bounded by the disk, and a killed call can
                be repeated. Refined ones are saved beside the draws, in `refined_folder`.
            format: npy, dcd or xtc (see `WeightedSamples.save`).

        Raises UserError where the run has no generator, no likelihood of that kind, or not yet, for a system that it is
        not for, for numbers that make no sense, and for a folder with other samples than these.
        """
        require(
            "sample", n=n, likelihood=likelihood, seed=seed, batch_size=batch_size, n_probes=n_probes, format=format
        )
        generator = self.generator(system)
        check_trajectory_format(format, generator.system.dim)
        likelihood = choose_likelihood(generator, likelihood)
        at_once = min(batch_size or generator.batch_size(likelihood), n)
        settings: dict[str, Any] = {"batch_size": at_once, "n_probes": n_probes}
        if refine:
            refinement.require_base(generator, likelihood)
            beside = None if folder is None else refined_folder(folder)
            draws = self.sample(n, system=system, seed=seed, batch_size=batch_size, folder=folder)
            how: dict[str, Any] = {"seed": seed, "folder": beside, "format": format}
            return ranks.after_first(refinement.refine)(generator, draws, refinement.settings_of(self.config), **how)

        def numbers(k: int) -> torch.Generator:
            return self._work.generator(f"user {seed}", index=k)

        if folder is not None:
            settings |= {"meta": {"seed": seed}, "format": format}
            return draw_to_folder(generator, Path(folder), n, likelihood, numbers, **settings)
        batches = list(draw_batches(generator, n, likelihood, numbers, **settings))
        arrays = (
            torch.cat([batch.positions for batch in batches]),
            torch.cat([batch.energy for batch in batches]),
            torch.cat([batch.log_prob for batch in batches]),
        )
        counts: Counter[str] = Counter()
        for batch in batches:
            counts.update(batch.counts)
        meta = {"likelihood": likelihood, "seed": seed, "counts": dict(counts)}
        positions, energy, log_prob = (a.cpu().numpy() for a in arrays)
        return WeightedSamples(positions, energy, log_prob, topology=generator.system.topology, meta=meta)


def refined_folder(folder: Path | str) -> Path:
    """Where `Run.sample` saves what it refines of draws in ``folder``: ``<folder>-refined``."""
    folder = Path(folder).absolute()
    return folder.with_name(f"{folder.name}-refined")


def load_run(path: Path | str, device: str = "auto", trust: bool = False) -> Run:
    """Open a run folder that `train_run` or ``boltznce train`` has made; raises UserError if it is none.

    Its config may name the library's classes and those that `boltznce.trust.register` was called on; with ``trust``
    any, which are then imported, and so executed. ``pretrained/<name>`` is one that ships (see `load_pretrained`).
    """
    return Run(path, device, trust)


def load_pretrained(name: str, device: str = "auto") -> Run:
    """A trained run that ships with the package, by its name; nothing is ever written to its folder.

    A run of many molecules draws any peptide of the residues that it was trained on, in its lists or not:

    >>> run = load_pretrained("dipeptides")  # doctest: +SKIP
    >>> samples = run.sample(10_000, system="KS", refine=True)  # doctest: +SKIP

    Raises UserError, listing those that there are, for another name.
    """
    return Run(folder_of(name), device)


def _config(folder: RunFolder) -> DictConfig:
    config = folder.config
    sections = (config.get(name) for name in ("method", "system"))
    if not all(isinstance(section, DictConfig) and "_target_" in section for section in sections):
        raise damaged(folder.path / "config.yaml", "it is not that of a run", REMEDY)
    return config


def set_threads(threads: int | None) -> None:
    """The number of CPU threads of torch; None leaves it at one a core."""
    require(threads=threads)
    if threads is not None:
        torch.set_num_threads(threads)
