"""A run of many molecules fitted to one of them. `python scripts/finetune.py run=outputs/... peptide=KS`"""

from omegaconf import DictConfig

from boltznce.cli import launch
from boltznce.methods.finetune import start_finetuning
from boltznce.run import train


def main(config: DictConfig) -> None:
    print(train(start_finetuning(config.run, config.peptide, config.settings, config.output, config.trust)))


if __name__ == "__main__":
    launch("finetune", main)
