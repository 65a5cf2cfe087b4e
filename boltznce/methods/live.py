"""To see a run go: its learning curves so far, drawn anew while it trains."""

import time
from collections.abc import Callable
from pathlib import Path

from boltznce.io import atomic_file
from boltznce.logger import read_log

__all__ = ["live_curves", "redraw_curves"]

EVERY = 30.0  # seconds, at most so often
NO_LOSSES = ("grad_norm",)


def live_curves(folder: Path, name: str) -> Callable[[], None]:
    """What a training is to call after each checkpoint: draws ``figures/learning_curves.png``, if that is due."""
    last = time.monotonic()

    def redraw() -> None:
        nonlocal last
        if time.monotonic() - last > EVERY:
            redraw_curves(folder, name)
            last = time.monotonic()

    return redraw


def redraw_curves(folder: Path, name: str) -> None:
    """Draw all losses in the log ``<name>.csv``; the report's figure takes the place of this one."""
    from boltznce.analysis.plotting import plot_learning_curves  # slow to import, and only runs need it

    curves: dict[str, tuple[list[float], list[float]]] = {}
    for row in read_log(folder / f"{name}.csv"):
        for column, cell in row.items():
            kind, _, key = column.partition("/")
            if cell and kind in ("train", "validation") and key not in NO_LOSSES:
                steps, values = curves.setdefault(f"{name}, {key}/{kind}", ([], []))
                steps.append(float(row["step"]))
                values.append(float(cell))
    with atomic_file(folder / "figures" / "learning_curves.png") as path:
        plot_learning_curves(curves).savefig(path, format="png")
