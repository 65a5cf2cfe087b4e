"""A run of many molecules fitted to one of them. `boltznce finetune run=outputs/... peptide=KS`"""

from omegaconf import DictConfig

from boltznce.methods.finetune import start_finetuning
from boltznce.run import train


def main(config: DictConfig) -> None:
    print(train(start_finetuning(config.run, config.peptide, config.settings, config.output, config.trust)))
