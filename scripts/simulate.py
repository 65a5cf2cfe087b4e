"""Reference data by simulation. `python scripts/simulate.py system=aldp`; with reference=true also the system's reference free energy."""

import shlex
import sys
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from boltznce.cli import launch
from boltznce.config import build
from boltznce.data.many import simulate_many
from boltznce.data.reference import REFERENCE_FOLDER, make_reference, save_reference
from boltznce.data.simulate import simulate, umbrella_result
from boltznce.errors import UserError
from boltznce.systems.family import PeptideFamily


def main(config: DictConfig) -> None:
    system = build(config.system)
    if config.reference and config.sampling != "umbrella":
        raise UserError("A reference needs umbrella sampling: set sampling=umbrella.")
    folder = Path(config.data_dir) / config.name
    if getattr(system, "many", False):
        return simulate_family(system, folder, config)
    dataset = simulate(system, folder, config.sampling, **settings(config))
    print(f"{len(dataset)} frames in {folder}")
    if config.reference:
        result = umbrella_result(dataset, **({"state": system.state[1]} if system.state else {}))
        command = shlex.join(["python", "scripts/simulate.py", *sys.argv[1:]])
        output = Path(config.output) if config.output else REFERENCE_FOLDER / f"{system.name}.json"
        save_reference(make_reference(system, dataset.meta, result, command), output)
        print(result.summary())
        print(f"reference in {output}")


def simulate_family(family: PeptideFamily, folder: Path, config: DictConfig) -> None:
    if config.reference:
        raise UserError(f"{family.name} are many molecules: make references one by one, for example with system={family.all_sequences[0]}.")
    datasets = simulate_many(family, folder, config.sampling, **settings(config))
    print(f"{len(datasets)} peptides, {sum(map(len, datasets.values()))} frames in {folder}")


def settings(config: DictConfig) -> dict:
    named = {key: config[key] for key in ("duration", "n_repeats", "n_processes", "engine", "seed")}
    return named | OmegaConf.to_container(config.settings)


if __name__ == "__main__":
    launch("simulate", main)
