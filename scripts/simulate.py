"""`python scripts/simulate.py` is `boltznce simulate`, in a clone: see boltznce/commands/simulate.py."""

from boltznce.cli import launch
from boltznce.commands.simulate import main

if __name__ == "__main__":
    launch("simulate", main)
