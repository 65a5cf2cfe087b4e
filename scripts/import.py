"""`python scripts/import.py` is `boltznce import`, in a clone: see boltznce/commands/import_.py."""

from boltznce.cli import launch
from boltznce.commands.import_ import main

if __name__ == "__main__":
    launch("import", main)
