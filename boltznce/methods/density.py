"""What an EBM learns of a known density: trained on exact draws of a system in the plane, compared with it on a grid.

No flow comes between, so that nothing but the objective (NCE, score matching, or both) is on trial. Stages: ebm ->
report. A sweep over systems, objectives and seeds ends with a figure and a table of all its runs.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
from matplotlib.figure import Figure
from omegaconf import DictConfig
from torch import Tensor, nn

from boltznce import ranks
from boltznce.analysis.main_numbers import DENSITY
from boltznce.analysis.metrics import density_errors
from boltznce.analysis.plotting import plot_densities
from boltznce.analysis.report import write_report
from boltznce.config import build
from boltznce.errors import UserError
from boltznce.io import atomic_file
from boltznce.methods.models import load_trained, make, weights_path
from boltznce.methods.preflight import check_ebm
from boltznce.methods.provenance import energy_in_words
from boltznce.methods.workspace import Workspace
from boltznce.records import read_archive
from boltznce.run_folder import AGAIN, RunFolder
from boltznce.systems.base import System
from boltznce.systems.toy import PlaneSystem

__all__ = ["STAGES", "check", "load_models", "summary", "sweep_figure"]

TITLES = {"nce": "NCE", "score": "score matching", "both": "both"}
CALIBRATION = 4096  # draws on which a network measures the scale of its inputs


def check(config: DictConfig, system: System) -> None:
    """Raise UserError for what can be known to fail (see `preflight`)."""
    if not system.example.exact:
        raise UserError(
            f"method=density compares with a density that is known: {system.name} has none, choose one in the plane."
        )
    check_ebm(config, system)


def train_ebm(work: Workspace) -> dict:
    """Fit the EBM to draws of the system itself, new ones at every step."""
    section, system = work.config.ebm, work.system
    model = make(work.config, system, "ebm").to(work.device)
    model.calibrate(system, system.sample(CALIBRATION, work.generator("calibration")), work.generator("noise"))
    held_out = system.sample(section.n_validation, work.generator("validation"))

    def loss(model: nn.Module, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        return model.of(system).loss(system.sample(section.batch_size, generator), generator)

    def validate(model: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
        return {key: value.detach() for key, value in model.of(system).loss(held_out, generator).items()}

    return work.fit("ebm", model, loss, validate)


@ranks.by_first
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
    work.folder.leave(folder / "metrics.json")
    with atomic_file(work.folder.leave(folder / "density.npz")) as path, open(path, "wb") as handle:
        np.savez(handle, log_p=log_p.reshape(n, n), log_q=log_q.reshape(n, n))
    results = {
        "system": system.name,
        "method": config.method.name,
        "budget": config.budget,
        "objective": config.ebm.model.objective,
        "seed": config.seed,
        "density": errors,
        "timing": {"stages": {"ebm": work.folder.stages["ebm"]["seconds"]}},
        "settings": {"steps": config.ebm.fit.steps, "batch": config.ebm.batch_size, "grid": f"{n} x {n}"}
        | {"temperature": f"{system.temperature:g}", "energy": energy_in_words(system.identity)},
    }
    title = TITLES[config.ebm.model.objective]
    figure = plot_densities({system.name: _densities(log_p, log_q, title)}, {system.name: system.box})
    write_report(folder, results, {"density": figure})
    return {}


def load_models(folder: Path, config: DictConfig, system: PlaneSystem, device: torch.device) -> NoReturn:
    """Raise UserError: an EBM is no generator."""
    raise UserError(
        f"The run in {folder} is one of method=density, which trains no generator: there is nothing to draw from. "
        "Choose a run of another method; the learned density is in density.npz."
    )


def summary(work: Workspace) -> str:
    """The run's errors in one line."""
    metrics = work.folder.metrics
    numbers = ", ".join(
        f"{title} {metrics['density'][key]:.4f}"
        for key, title in DENSITY.items()
        if metrics["density"][key] is not None
    )
    return f"{metrics['system']} · {metrics['objective']} · seed {metrics['seed']}: {numbers}"


def sweep_figure(runs: Sequence[RunFolder]) -> Figure:
    """Densities of each system and objective, of the first run of each, with its mean errors over all of them."""
    rows: dict[str, dict] = {}
    boxes, notes, errors = {}, {}, {}
    for run in runs:
        name, title = run.metrics["system"], TITLES[run.metrics["objective"]]
        errors.setdefault((name, title), []).append(run.metrics["density"])
        if title not in rows.setdefault(name, {}):
            grids = read_archive(run.path / "density.npz", AGAIN, {"log_p": (None, None), "log_q": (None, None)})
            rows[name] |= _densities(grids["log_p"], grids["log_q"], title)
            boxes[name] = build(run.config.system).box
    for key, found in errors.items():
        means = {what: np.mean([each[what] for each in found]) for what in DENSITY if found[0][what] is not None}
        other = "leaked_mass" if means.get("leaked_mass") else "mode_weight_error"
        name = "leak" if other == "leaked_mass" else "weights"
        notes[key] = f"KL {means['forward_kl']:.3f}   {name} {100 * means[other]:.1f}%"
    return plot_densities(rows, boxes, notes)


def _densities(log_p: np.ndarray, log_q: np.ndarray, title: str) -> dict[str, np.ndarray]:
    """Probabilities of the cells, each normalized on the grid."""
    n = int(np.sqrt(log_p.size))
    return {
        name: np.exp(log - np.logaddexp.reduce(log, axis=None)).reshape(n, n)
        for name, log in (("true", log_p), (title, log_q))
    }


STAGES = {"ebm": train_ebm, "report": report}
