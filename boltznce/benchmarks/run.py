"""Run one benchmark and leave its table, figure and numbers, with the machine they belong to, in a folder."""

import json
import platform
from datetime import date
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf

from boltznce.benchmarks import energy, free_energy, likelihood, network, spline
from boltznce.errors import UserError
from boltznce.folders import Kind, claim, only_process
from boltznce.io import atomic_file
from boltznce.methods.workspace import make_fabric
from boltznce.run import set_threads

__all__ = ["BENCHMARKS", "run_benchmark"]

# what -> (measure(**section, device, seed; min_seconds, or of a run: run, trust) -> rows, -> Markdown, -> Figure)
BENCHMARKS = {
    "energy": (energy.measure_energy, energy.energy_table, energy.energy_figure),
    "network": (network.measure_network, network.network_table, network.network_figure),
    "likelihood": (likelihood.measure_likelihood, likelihood.likelihood_table, likelihood.likelihood_figure),
    "free_energy": (free_energy.measure_free_energy, free_energy.free_energy_table, free_energy.free_energy_figure),
    "spline": (spline.measure_spline, spline.spline_table, spline.spline_figure),
}
OF_A_RUN = ("likelihood", "free_energy")


def run_benchmark(config: DictConfig) -> str:
    """Measure ``config.what`` with its section of the config; returns the table that is also written to ``output``.

    Raises UserError for an unknown benchmark, a run that it is not of, an output with files of others, and one where
    another process works.
    """
    if config.what not in BENCHMARKS:
        raise UserError(f"Unknown what={config.what}: choose one of {', '.join(BENCHMARKS)}.")
    of_a_run = config.what in OF_A_RUN
    if config.run is not None and not of_a_run:
        raise UserError(f"what={config.what} is not of a run: leave run out, or set what to {' or '.join(OF_A_RUN)}.")
    folder = Path(config.output)
    others = "|".join(what for what in BENCHMARKS if what != config.what)
    keys = frozenset({"machine", "settings", "rows"})
    claim(folder, Kind("benchmarks", f"{config.what}.json", keys, rf"({others})\.(json|md|png)"), "another output")
    measure, table, figure = BENCHMARKS[config.what]
    set_threads(config.threads)
    device = make_fabric(config.device).device
    settings = OmegaConf.to_container(config[config.what], resolve=True)
    how = {"run": config.run, "trust": config.trust} if of_a_run else {"min_seconds": config.min_seconds}
    with only_process(folder):
        rows = measure(**settings, **how, device=device, seed=config.seed)
        return _write(config.what, folder, rows, settings, device, table(rows), figure(rows))


def _write(what: str, folder: Path, rows: list, settings: dict, device: torch.device, table: str, figure) -> str:
    machine = machine_description(device)
    where = ", ".join(f"{key} {value}" for key, value in machine.items())
    text = f"{table}\n\nMeasured on {date.today()}: {where}.\n"
    with atomic_file(folder / f"{what}.json") as path:
        path.write_text(
            json.dumps({"machine": machine, "settings": settings, "rows": rows}, indent=1), encoding="utf-8"
        )
    with atomic_file(folder / f"{what}.md") as path:
        path.write_text(text, encoding="utf-8")
    with atomic_file(folder / f"{what}.png") as path:
        figure.savefig(path, format="png", bbox_inches="tight")
    return text


def machine_description(device: torch.device) -> dict[str, str | int]:
    """What a number must be read with: processor or GPU, threads, versions."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    return {"device": name, "threads": torch.get_num_threads()} | versions


def _processor() -> str:
    """The model of the CPU as Linux tells it, else its architecture."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
