"""`python scripts/finetune.py` is `boltznce finetune`, in a clone: see boltznce/commands/finetune.py."""

from boltznce.cli import launch
from boltznce.commands.finetune import main

if __name__ == "__main__":
    launch("finetune", main)
