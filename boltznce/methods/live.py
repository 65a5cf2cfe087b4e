"""Learning curves by the logs of a run, drawn anew while it trains."""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from boltznce.io import atomic_file
from boltznce.logger import read_log

__all__ = ["learning_curves", "live_curves", "redraw_curves"]

KINDS = ("train", "validation")  # beginnings of a log's columns
EVERY = 30.0  # seconds, at most so often
NO_LOSSES = ("grad_norm",)


def learning_curves(
    folder: Path, wanted: Mapping[str, Mapping[str, str]]
) -> dict[str, tuple[Sequence[float], Sequence[float]]]:
    """Training and validation losses of the logs that are there; ``wanted``: name of the log -> {its column: title}."""
    curves = {}
    for name, losses in wanted.items():
        rows = read_log(folder / f"{name}.csv")
        for key, title in losses.items():
            for kind in KINDS:
                points = [(float(r["step"]), float(r[f"{kind}/{key}"])) for r in rows if r.get(f"{kind}/{key}")]
                if points:
                    curves[f"{title}/{kind}"] = tuple(zip(*points, strict=True))
    return curves


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

    path = folder / f"{name}.csv"
    columns = dict.fromkeys(column for row in read_log(path) for column, cell in row.items() if cell)
    kinds = (column.partition("/") for column in columns)
    losses = [key for kind, _, key in kinds if kind in KINDS and key not in NO_LOSSES]
    curves = learning_curves(folder, {name: {key: f"{name}, {key}" for key in losses}})
    with atomic_file(folder / "figures" / "learning_curves.png") as path:
        plot_learning_curves(curves).savefig(path, format="png")
