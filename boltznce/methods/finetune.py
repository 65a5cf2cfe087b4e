"""Fine-tuning of a run to one molecule: the same method on that molecule alone, from the run's weights on.

Its EBM is fitted to the flow's draws for the molecule, and its flow, if asked for, to the molecule's own simulation.
"""

from pathlib import Path

from omegaconf import DictConfig, OmegaConf, open_dict

from boltznce.command_line import command_line
from boltznce.config import build
from boltznce.errors import UserError
from boltznce.methods.models import weights_path
from boltznce.run_folder import RunFolder
from boltznce.systems.molecular import MolecularSystem

__all__ = ["start_finetuning"]


def start_finetuning(
    parent: Path | str,
    peptide: str,
    settings: DictConfig,
    folder: Path | str | None = None,
    trust: bool = False,
) -> RunFolder:
    """The folder of a fine-tuning, by default ``finetuned/<peptide>`` of the parent run, for `boltznce.run.train`.

    Its config is the parent's, of the one peptide, with the sections of ``settings`` (see configs/finetune.yaml) in
    place of the parent's.

    Raises UserError for a parent that is of one molecule or whose flow is not trained, and for a peptide that cannot be
    built; of a parent that names foreign classes, without ``trust``.
    """
    run = RunFolder.open(Path(parent), trust)
    config, starts = run.config, {name: weights_path(run.path, name) for name in ("flow", "ebm")}
    family = build(config.system)
    if not family.is_family:
        raise UserError(f"{parent} is a run of {family.name} alone: only runs of many molecules are fine-tuned to one.")
    missing = [name for name, path in starts.items() if name in config and not path.exists()]
    if missing:
        finish = command_line("train", f"resume={parent}")
        raise UserError(f"{parent} has no trained {missing[0]} yet: finish it with {finish}.")
    if "ebm" not in config and not settings.finetune.flow_steps:
        raise UserError(
            f"{parent} has no EBM to fine-tune: set finetune.flow_steps, which trains its flow on a simulation."
        )
    family.choose(peptide)
    steps = settings.finetune
    if steps.flow_steps:
        run.check_writes(Path(config.data.folder) / peptide)
    with open_dict(config):
        config.system = {"_target_": f"{MolecularSystem.__module__}.MolecularSystem", **family.settings_of(peptide)}
        config.data.folder = str(Path(config.data.folder) / peptide)
        config.data.split = steps.split
        config.data.accept = "any"  # the parent's, where there are some
        simulation = OmegaConf.merge(family.simulation, config.data.simulation, steps.simulation)
        config.data.simulation = {key: value for key, value in simulation.items() if key != "test"}
        config.kind = "molecule"
        for name in starts.keys() & config.keys():
            fit = {"steps": steps[f"{name}_steps"], "lr": steps.lr}
            config[name] = OmegaConf.merge(config[name], {"start": str(starts[name].absolute()), "fit": fit})
        if "samples" in config:
            config.samples = OmegaConf.merge(config.samples, settings.samples)
    return RunFolder.create(Path(folder or run.path / "finetuned" / peptide), config, config.system.name)
