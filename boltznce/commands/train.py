"""The main job: data, a generator, its likelihood, weights and a report. `boltznce train system=aldp`"""

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from boltznce.errors import UserError
from boltznce.run import RunFolder, start_folder, train


def main(config: DictConfig) -> None:
    if config.resume is None:
        print(train(start_folder(HydraConfig.get().runtime.output_dir, config)))
        return
    given = [word for word in HydraConfig.get().overrides.task if not word.startswith(("resume=", "budget=", "trust="))]
    run = RunFolder.open(config.resume, config.trust)
    if any(word.startswith("system=") for word in given):
        run.check_system(config.system.name)
    if any(not word.startswith("system=") for word in given):
        raise UserError(
            f"resume= goes on with the run's own settings: leave out {' '.join(given)}, or start a new run."
        )
    print(train(run))
