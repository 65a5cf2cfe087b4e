"""What an EBM learns of a known density: trained on exact draws of a system in the plane, compared with it on a grid.

No flow comes between, so that nothing but the objective (NCE, score matching, or both) is on trial. Stages: ebm ->
report. A sweep over systems, objectives and seeds ends with a figure and a table of all its runs.
"""

import json
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from boltznce.analysis import plotting
from boltznce.analysis.metrics import density_errors
from boltznce.analysis.report import markdown_table, write_report
from boltznce.config import build
from boltznce.errors import UserError
from boltznce.io import atomic_file
from boltznce.methods.models import load_trained, make, weights_path
from boltznce.methods.workspace import Workspace
from boltznce.systems.toy import PlaneSystem

__all__ = ["STAGES", "DrawSweep", "draw_sweep", "load_models", "summary"]

TITLES = {"nce": "NCE", "score": "score matching", "both": "both"}
CALIBRATION = 4096  # draws on which a network measures the scale of its inputs
COLUMNS = {
    "forward_kl": "KL(true ‖ learned)",
    "reverse_kl": "KL(learned ‖ true)",
    "leaked_mass": "leaked mass",
    "mode_weight_error": "mode-weight error",
}


def train_ebm(work: Workspace) -> dict:
    """Fit the EBM to draws of the system itself, new ones at every step."""
    section, system = work.config.ebm, work.system
    if not system.exact:
        raise UserError(
            f"method=density compares with a density that is known: {system.name} has none, choose a system in the plane."
        )
    model = make(work.config, system, "ebm").to(work.device)
    model.calibrate(system, system.sample(CALIBRATION, work.generator("calibration")), work.generator("noise"))
    held_out = system.sample(section.n_validation, work.generator("validation"))

    def loss(model: nn.Module, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        return model.of(system).loss(system.sample(section.batch_size, generator), generator)

    def validate(model: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
        return {key: value.detach() for key, value in model.of(system).loss(held_out, generator).items()}

    return work.fit("ebm", model, loss, validate)


def report(work: Workspace) -> dict:
    """Compare the learned density with the true one on a grid, both normalized on it.

    ``density.npz`` has their logarithms.
    """
    config, system, folder = work.config, work.system, work.folder.path
    n = config.evaluation.grid
    model = load_trained(make(config, system, "ebm"), weights_path(folder, "ebm")).to(work.device)
    x = system.grid(n)
    log_q = model.of(system).log_prob_in_batches(x.float().to(work.device)).cpu().numpy()
    log_p = system.log_prob(x).numpy()
    errors = density_errors(log_p, log_q, system.mode(x).numpy(), system.support(x).numpy())
    with atomic_file(folder / "density.npz") as path, open(path, "wb") as handle:
        np.savez(handle, log_p=log_p.reshape(n, n), log_q=log_q.reshape(n, n))
    results = {
        "system": system.name,
        "method": config.method.name,
        "budget": config.budget,
        "objective": config.ebm.model.objective,
        "seed": config.seed,
        "density": errors,
        "timing": {"stages": {"ebm": work.folder.stages["ebm"]["seconds"]}},
        "settings": {"steps": config.ebm.fit.steps, "batch": config.ebm.batch_size, "grid": f"{n} x {n}"},
    }
    title = TITLES[config.ebm.model.objective]
    figure = plotting.plot_densities({system.name: _densities(log_p, log_q, n, title)}, {system.name: system.box})
    write_report(folder, results, {"density": figure})
    return {}


def load_models(folder: Path, config: DictConfig, system: PlaneSystem, device: torch.device) -> NoReturn:
    """Raise UserError: an EBM is no generator."""
    raise UserError(
        f"The run in {folder} is one of method=density, which trains an EBM and no generator: there is nothing to draw from. "
        "Choose a run of another method; the learned density is in density.npz."
    )


def summary(work: Workspace) -> str:
    """The run's errors in one line."""
    metrics = json.loads((work.folder.path / "metrics.json").read_text())
    numbers = ", ".join(
        f"{title} {metrics['density'][key]:.4f}"
        for key, title in COLUMNS.items()
        if metrics["density"][key] is not None
    )
    return f"{metrics['system']} · {metrics['objective']} · seed {metrics['seed']}: {numbers}"


STAGES = {"ebm": train_ebm, "report": report}


# ---- sweeps -----------------------------------------------------------------------------------------------------------


class DrawSweep(Callback):
    """Draws the figure and writes the table when a sweep has ended (``hydra.callbacks`` of an experiment)."""

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        print(draw_sweep(Path(config.hydra.sweep.dir)))


def draw_sweep(folder: Path) -> str:
    """Write ``figure.png``, ``table.md`` and ``table.json`` of all finished runs below ``folder``; return the table.

    The figure shows the first seed of each system and objective, the table mean ± standard deviation over all seeds.
    """
    done = [path.parent for path in folder.rglob("density.npz") if (path.parent / "metrics.json").exists()]
    runs = [_load(run) for run in sorted(done, key=lambda run: json.loads((run / "run.json").read_text())["started"])]
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
                rows[name] |= _densities(log_p, log_q, len(log_p), title)
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
        path.write_text(json.dumps(table, indent=2) + "\n")
    with atomic_file(folder / "table.md") as path:
        path.write_text(text + "\n", encoding="utf-8")
    with atomic_file(folder / "figure.png") as path:
        plotting.plot_densities(rows, boxes, notes).savefig(path, format="png", dpi=200)
    return f"{text}\n\nFigure: {folder / 'figure.png'}"


def _load(folder: Path) -> dict:
    system = build(OmegaConf.load(folder / "config.yaml").system)
    return {
        "metrics": json.loads((folder / "metrics.json").read_text()),
        "box": system.box,
        **np.load(folder / "density.npz"),
    }


def _densities(log_p: np.ndarray, log_q: np.ndarray, n: int, title: str) -> dict[str, np.ndarray]:
    """Probabilities of the cells, each normalized on the grid."""
    return {
        name: np.exp(log - np.logaddexp.reduce(log, axis=None)).reshape(n, n)
        for name, log in (("true", log_p), (title, log_q))
    }


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
