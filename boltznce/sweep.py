"""What a sweep of ``method=density`` ends with: a figure and a table of all its runs."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from boltznce.analysis.plotting import plot_densities
from boltznce.analysis.report import markdown_table
from boltznce.config import build
from boltznce.errors import UserError
from boltznce.io import atomic_file
from boltznce.methods.density import COLUMNS, TITLES, densities
from boltznce.records import read_archive
from boltznce.run_folder import AGAIN, RunFolder

__all__ = ["DrawSweep", "draw_sweep"]


class DrawSweep(Callback):
    """Draws the figure and writes the table when a sweep has ended (``hydra.callbacks`` of an experiment)."""

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        print(draw_sweep(Path(config.hydra.sweep.dir), trust=True))  # composed by the user, just now


def draw_sweep(folder: Path, trust: bool = False) -> str:
    """Write ``figure.png``, ``table.md`` and ``table.json`` of all finished runs below ``folder``; return the table.

    The figure shows the first seed of each system and objective, the table mean ± standard deviation over all seeds.
    Raises UserError where a run is damaged, or names foreign classes without ``trust``.
    """
    done = [path.parent for path in folder.rglob("density.npz") if (path.parent / "metrics.json").exists()]
    folders = sorted((RunFolder.open(run, trust) for run in done), key=lambda run: run.started)
    runs = [_load(run) for run in folders]
    if not runs:
        raise UserError(f"{folder} has no finished runs of method=density: give the folder of a sweep.")
    systems = list(dict.fromkeys(run["metrics"]["system"] for run in runs))
    rows, table, boxes, notes = {}, [], {}, {}
    for name in systems:
        here = [run for run in runs if run["metrics"]["system"] == name]
        rows[name], boxes[name] = {}, here[0]["box"]
        for objective, title in TITLES.items():
            same = sorted(
                (run for run in here if run["metrics"]["objective"] == objective),
                key=lambda run: run["metrics"]["seed"],
            )
            if same:
                log_p, log_q = same[0]["log_p"], same[0]["log_q"]
                rows[name] |= densities(log_p, log_q, len(log_p), title)
                table.append({"system": name, "objective": objective, "seeds": len(same), **_over_seeds(same)})
                notes[name, title] = _note(table[-1])
    text = markdown_table(
        [["system", "objective", "seeds", *COLUMNS.values()]]
        + [
            [row["system"], row["objective"], str(row["seeds"]), *(_mean_and_std(row[key]) for key in COLUMNS)]
            for row in table
        ]
    )
    with atomic_file(folder / "table.json") as path:
        path.write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
    with atomic_file(folder / "table.md") as path:
        path.write_text(text + "\n", encoding="utf-8")
    with atomic_file(folder / "figure.png") as path:
        plot_densities(rows, boxes, notes).savefig(path, format="png", dpi=200)
    return f"{text}\n\nFigure: {folder / 'figure.png'}"


def _load(run: RunFolder) -> dict:
    grids = read_archive(run.path / "density.npz", AGAIN, {"log_p": (None, None), "log_q": (None, None)})
    return {"metrics": run.metrics, "box": build(run.config.system).box, **grids}


def _over_seeds(runs: list[dict]) -> dict[str, dict[str, float] | None]:
    """Mean and standard deviation of each error; None where it is not finite for a system."""
    found: dict[str, dict[str, float] | None] = {}
    for key in COLUMNS:
        values = [run["metrics"]["density"][key] for run in runs]
        spread = float(np.std(values, ddof=1)) if None not in values and len(values) > 1 else None
        found[key] = None if None in values else {"mean": float(np.mean(values)), "std": spread}
    return found


def _note(row: dict) -> str:
    """What stands below a panel: the divergence, and the error of the mode weights or the leaked mass."""
    other = "leaked_mass" if row["leaked_mass"] else "mode_weight_error"
    name = "leak" if other == "leaked_mass" else "weights"
    return f"KL {row['forward_kl']['mean']:.3f}   {name} {100 * row[other]['mean']:.1f}%"


def _mean_and_std(entry: dict[str, float] | None) -> str:
    if entry is None:
        return "–"
    return f"{entry['mean']:.4f}" + ("" if entry["std"] is None else f" ± {entry['std']:.4f}")
