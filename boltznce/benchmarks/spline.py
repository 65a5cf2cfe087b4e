"""Microseconds a sample of the spline flow on internal coordinates: draws, likelihoods and steps of training."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from matplotlib.figure import Figure
from omegaconf import OmegaConf
from tqdm.auto import tqdm

from boltznce.analysis.plotting import plot_energy_cost
from boltznce.annealing import log_variance, path_kl, reverse_kl
from boltznce.benchmarks.timing import time_call
from boltznce.config import load_system
from boltznce.flows.spline_flow import SplineFlow
from boltznce.methods.spline_models import make_coordinates
from boltznce.systems.base import System

__all__ = ["measure_spline", "spline_figure", "spline_table"]

KINDS = ("sample + log q", "log q", "step of reverse KL", "step of log-variance", "step of path KL")


def measure_spline(
    systems: Sequence[str],
    flows: Mapping[str, Mapping[str, Any]],
    modes: Sequence[str],
    *,
    batch_size: int,
    temperature: float,
    device: str | torch.device = "cpu",
    min_seconds: float = 1.0,
    seed: int = 0,
) -> list[dict]:
    """One row a system, flow, mode (``eager``, ``compiled``) and kind, with quartiles in µs a sample.

    Args:
        flows: label -> keywords of `SplineFlow`.
    """
    rows = []
    with tqdm(total=len(systems) * len(flows) * len(modes), desc="spline", unit="case") as bar:
        for name in systems:
            system = load_system(name).at_temperature(temperature)
            coordinates = make_coordinates(system, OmegaConf.create({"coordinates": {"temperature": temperature}}))
            for label, settings in flows.items():
                for mode in modes:
                    torch.manual_seed(seed)
                    flow = SplineFlow(coordinates, **settings, compile=mode == "compiled").to(device)
                    generator = torch.Generator(device).manual_seed(seed)
                    case = {"molecule": name, "n_atoms": system.n_atoms, "flow": label, "backend": mode}
                    for kind, call in _calls(flow, system, batch_size, generator).items():
                        timing = time_call(call, min_seconds).per(batch_size)
                        rows.append(case | {"kind": kind, "batch_size": batch_size} | timing)
                    bar.update()
    return rows


def _calls(flow: SplineFlow, system: System, n: int, generator: torch.Generator) -> dict[str, Callable[[], object]]:
    x, _ = flow.sample(n, generator)

    def likelihood() -> None:
        with torch.no_grad():
            flow.log_prob(x)

    def reverse_kl_step() -> None:
        x, log_q = flow.sample_with_log_prob(n, generator)
        flow.zero_grad()
        reverse_kl(log_q, system.energy(x))["loss"].backward()

    def log_variance_step() -> None:
        x, log_q = flow.sample_with_fixed_log_prob(n, generator)
        with torch.no_grad():
            u = system.energy(x)
        flow.zero_grad()
        log_variance(log_q, u)["loss"].backward()

    def path_kl_step() -> None:
        x, log_q = flow.sample_with_path_log_prob(n, generator)
        flow.zero_grad()
        path_kl(log_q, system.energy(x))["loss"].backward()

    def draw() -> None:
        flow.sample(n, generator, batch_size=n)

    return dict(zip(KINDS, (draw, likelihood, reverse_kl_step, log_variance_step, path_kl_step), strict=True))


def spline_table(rows: Sequence[Mapping]) -> str:
    """Markdown: a line for each molecule, flow and mode, a column for each kind."""
    cells = {(r["molecule"], r["n_atoms"], r["flow"], r["backend"], r["kind"]): r for r in rows}
    lines = [
        "| molecule | dimension | flow | mode | " + " | ".join(f"{kind} (µs)" for kind in KINDS) + " |",
        "|---" * (4 + len(KINDS)) + "|",
    ]
    for molecule, n_atoms, flow, mode in dict.fromkeys(key[:4] for key in cells):
        here = [cells[molecule, n_atoms, flow, mode, kind] for kind in KINDS]
        values = [f"{r['median']:.0f} [{r['low']:.0f}, {r['high']:.0f}]" for r in here]
        lines.append(f"| {molecule} | {3 * n_atoms - 6} | {flow} | {mode} | " + " | ".join(values) + " |")
    return "\n".join([*lines, "", f"Batches of {rows[0]['batch_size']}; median and quartiles."])


def spline_figure(rows: Sequence[Mapping]) -> Figure:
    """µs a sample over the number of atoms, a panel for each kind, a line for each flow and mode."""
    return plot_energy_cost([row | {"backend": f"{row['flow']}, {row['backend']}"} for row in rows])
