"""A run of many molecules taken on to one of them: the same method on that molecule alone, from the run's weights on.

As they are, for a report of that molecule; or fine-tuned: the EBM fitted to the flow's draws for it, and the flow, if
asked for, to its own simulation.
"""

import logging
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from boltznce.command_line import command_line
from boltznce.config import build
from boltznce.errors import UserError
from boltznce.methods.drawing import Generator, choose_likelihood
from boltznce.methods.findings import COSTS, training_costs
from boltznce.methods.models import MODELS, weights_path
from boltznce.methods.refinement import require_base
from boltznce.run_folder import RunFolder
from boltznce.systems.family import PeptideFamily
from boltznce.systems.molecular import MolecularSystem

__all__ = ["start_finetuning", "start_report"]

log = logging.getLogger(__name__)


def start_finetuning(
    parent: Path | str,
    peptide: str,
    settings: DictConfig,
    folder: Path | str | None = None,
    trust: bool = False,
) -> RunFolder:
    """The folder of a fine-tuning, for `boltznce.run.train`; by default ``finetuned/<peptide>`` of the run's outputs.

    Its config is the parent's, of the one peptide, with the sections of ``settings`` (see configs/finetune.yaml) in
    place of the parent's.

    Raises UserError for a parent that is of one molecule or whose flow is not trained, and for a peptide that cannot be
    built; of a parent that names foreign classes, without ``trust``.
    """
    run, steps = RunFolder.open(Path(parent), trust), settings.finetune
    config, simulation = _of_one(run, peptide), run.config.data.simulation
    if "ebm" not in config and not steps.flow_steps:
        raise UserError(
            f"{run} has no EBM to fine-tune: set finetune.flow_steps, which trains its flow on a simulation."
        )
    if steps.flow_steps:
        run.check_writes(Path(config.data.folder))
    config.data.split = steps.split
    simulation = OmegaConf.merge(build(run.config.system).simulation, simulation, steps.simulation)
    config.data.simulation = {key: value for key, value in simulation.items() if key != "test"}
    for name in MODELS.keys() & config.keys():
        config[name].fit = OmegaConf.merge(config[name].fit, {"steps": steps[f"{name}_steps"], "lr": steps.lr})
    if "ebm" in config and steps.ebm_steps:
        config.samples = OmegaConf.merge(config.samples, settings.samples)
    return RunFolder.create(Path(folder or run.outputs / "finetuned" / peptide), config, config.system.name)


def start_report(
    parent: RunFolder,
    generator: Generator,
    folder: Path,
    *,
    n: int,
    refine: bool,
    likelihood: str = "auto",
    seed: int = 0,
    batch_size: int | None = None,
    device: str = "auto",
    format: str = "npy",
) -> RunFolder:
    """The folder of a report on one molecule of a run of many, for `boltznce.run.train`; nothing is trained for it.

    Nor simulated: where ``data.folder`` of the run has data of the molecule, they are compared with.

    Args:
        generator: of the run, for the molecule.
        n: how many samples, all of which are refined with ``refine``; ``seed``: of all random numbers.
        likelihood, batch_size, format: see `boltznce.run.Run.sample`.

    Raises UserError for a parent that is of one molecule, for a likelihood that is not the generator's own, which
    weighs the draws of reports, and where draws cannot be refined.
    """
    config, own = _of_one(parent, generator.system.name), generator.default_likelihood
    if refine:
        require_base(generator, choose_likelihood(generator, likelihood))
    elif choose_likelihood(generator, likelihood) != own:
        raise UserError(f"A report is on draws that likelihood={own} weighs, not {likelihood}: set report=false.")
    how: dict[str, Any] = {"n_samples": n, "refine": {"n_walkers": n}} if refine else {"n_samples": n, "refine": None}
    how |= {} if refine else {"frames": "data"}
    how |= {"batch_size": batch_size} if batch_size else {}
    how |= {"format": format} if format != "npy" else {}
    config = OmegaConf.merge(config, {"seed": seed, "device": device, "evaluation": how})
    return RunFolder.create(folder, config, config.system.name)


def _of_one(run: RunFolder, molecule: str) -> DictConfig:
    """The run's config, of one of its molecules alone, whose models are the run's: without steps, or a simulation.

    Raises UserError as `start_finetuning` does.
    """
    config, starts = run.config, {name: weights_path(run.path, name) for name in MODELS}
    family = build(config.system)
    if not family.is_family:
        raise UserError(f"{run} is a run of {family.name} alone: only runs of many molecules are taken on to one.")
    missing = [name for name, path in starts.items() if name in config and not path.exists()]
    if missing:
        finish = command_line("train", f"resume={run}")
        raise UserError(f"{run} has no trained {missing[0]} yet: finish it with {finish}.")
    family.choose(molecule)
    config.parent = _parent(run, family, molecule)
    config.system = {"_target_": f"{MolecularSystem.__module__}.MolecularSystem", **family.settings_of(molecule)}
    config.kind = "molecule"
    config.data.folder = str(Path(config.data.folder) / molecule)
    config.data.accept = "any"  # the parent's, where there are some
    config.data.simulation = None
    for name in starts.keys() & config.keys():
        config[name].start = str(starts[name].absolute())
        config[name].fit.steps = 0
    return config


def _parent(run: RunFolder, family: PeptideFamily, molecule: str) -> dict[str, Any]:
    """What a report says of the run that its models come from."""
    notes = family.strangeness(molecule)
    for note in notes:
        log.warning(note)
    costs = {key: training_costs(run.stages, key) for key in COSTS}
    return {"run": str(run), "trained_on": list(family.sequences["train"]), "notes": notes, "costs": costs}
