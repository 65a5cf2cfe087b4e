"""What the project's costly parts cost on this machine. `python scripts/benchmark.py what=energy`"""

from omegaconf import DictConfig

from boltznce.benchmarks.run import run_benchmark
from boltznce.cli import launch


def main(config: DictConfig) -> None:
    print(run_benchmark(config))


if __name__ == "__main__":
    launch("benchmark", main)
