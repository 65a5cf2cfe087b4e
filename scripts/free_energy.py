"""`python scripts/free_energy.py` is `boltznce free_energy`, in a clone: see boltznce/commands/free_energy.py."""

from boltznce.cli import launch
from boltznce.commands.free_energy import main

if __name__ == "__main__":
    launch("free_energy", main)
