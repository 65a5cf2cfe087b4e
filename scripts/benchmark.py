"""`python scripts/benchmark.py` is `boltznce benchmark`, in a clone: see boltznce/commands/benchmark.py."""

from boltznce.cli import launch
from boltznce.commands.benchmark import main

if __name__ == "__main__":
    launch("benchmark", main)
