"""`python scripts/sample.py` is `boltznce sample`, in a clone: see boltznce/commands/sample.py."""

from boltznce.cli import launch
from boltznce.commands.sample import main

if __name__ == "__main__":
    launch("sample", main)
