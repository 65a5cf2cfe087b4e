"""A job that is stopped in the middle, as by a kill."""

from pathlib import Path

import pytest

from boltznce.data.engine import run_job


class Interrupted(Exception):
    """Raised by what a job calls often."""


def interrupt(folder: Path, calls: int) -> None:
    """Run a job until it has asked so many times whether to go on; it must not have ended by then."""
    left = iter(range(calls))

    def alive():
        if next(left, None) is None:
            raise Interrupted

    with pytest.raises(Interrupted):
        run_job(folder, alive)
