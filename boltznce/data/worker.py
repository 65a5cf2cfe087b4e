"""A simulation process: ``python -m boltznce.data.worker FOLDER PARENT_PID``. It ends when its parent does,
but on Windows, where it goes on to the job's end.
"""

import os
import sys
from pathlib import Path

from boltznce.data.engine import run_job
from boltznce.errors import UserError
from boltznce.signals import ignore

__all__ = ["main"]


def main(folder: str, parent: str) -> None:
    """Run one job; a user's mistake is one line on stderr and exit status 2."""

    def alive() -> None:
        # on Windows a dead parent's id stays, and a virtual environment's Python is started by another one
        if os.name == "posix" and os.getppid() != int(parent):
            raise SystemExit("the parent process has gone")

    ignore()
    try:
        run_job(Path(folder), alive)
    except UserError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main(*sys.argv[1:])
