"""The main job: data, a generator, its likelihood, weights and a report. `boltznce train system=aldp`"""

from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from boltznce import ranks
from boltznce.objective import objective
from boltznce.records import as_dict
from boltznce.run import RunFolder, help_train, resume_folder, start_folder, train
from boltznce.run_inputs import with_changes

OF_THE_COMMAND = ("resume", "budget", "trust", "system")


def main(config: DictConfig) -> float | None:
    """Train; returns what a search over settings minimizes (see `boltznce.objective`)."""
    if config.resume is None:
        path = Path(HydraConfig.get().runtime.output_dir)
        if not ranks.is_first():
            help_train(path, config, trust=True)
            return None
        return _trained(start_folder(path, config))
    words = [word.lstrip("+").partition("=")[0] for word in HydraConfig.get().overrides.task]
    given = {name: OmegaConf.select(config, name) for name in words if name not in OF_THE_COMMAND}
    if not ranks.is_first():
        own = as_dict(RunFolder.open(config.resume, config.trust).config)
        help_train(Path(config.resume), OmegaConf.create(with_changes(own, given)), config.trust)
        return None
    if "system" in words:
        RunFolder.open(config.resume, config.trust).check_system(config.system.name)
    return _trained(resume_folder(config.resume, given, config.trust))


def _trained(folder: RunFolder) -> float:
    print(train(folder))
    return objective(folder.metrics, folder.config.get("minimize"))
