"""`python scripts/train.py` is `boltznce train`, in a clone: see boltznce/commands/train.py."""

from boltznce.cli import launch
from boltznce.commands.train import main

if __name__ == "__main__":
    launch("train", main)
