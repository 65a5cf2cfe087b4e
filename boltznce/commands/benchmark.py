"""What the project's costly parts cost on this machine. `boltznce benchmark what=energy`"""

from omegaconf import DictConfig

from boltznce.benchmarks.run import run_benchmark


def main(config: DictConfig) -> None:
    print(run_benchmark(config))
