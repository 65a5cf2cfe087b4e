"""Microseconds a conformer for the energy and for energy and forces: batched torch energy and OpenMM in one run."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from tqdm.auto import tqdm

from boltznce.analysis.plotting import plot_energy_cost
from boltznce.benchmarks.timing import time_call
from boltznce.config import load_system
from boltznce.errors import UserError

__all__ = ["energy_figure", "energy_table", "measure_energy"]

BACKENDS = {  # keywords of load_system
    "torch": {"energy_backend": "torch", "compile": False},
    "torch, compiled": {"energy_backend": "torch", "compile": True},
    "openmm": {"energy_backend": "openmm"},
}
KINDS = ("energy", "energy and forces")
THERMAL_NOISE = 0.003  # nm, put on a minimized structure: near enough to a thermal conformer for timing


def measure_energy(
    molecules: Mapping[str, Mapping[str, Any]],
    batch_sizes: Sequence[int],
    backends: Sequence[str],
    *,
    dtype: str = "float32",
    device: str | torch.device = "cpu",
    min_seconds: float = 1.0,
    seed: int = 0,
) -> list[dict]:
    """One row a molecule, backend, batch size and kind (energy; energy and forces), with quartiles in µs a conformer.

    Args:
        molecules: label -> keywords of ``load_system``; its name under ``system``.
        backends: of ``torch``, ``torch, compiled`` and ``openmm`` (the Reference platform, in processes on all cores
            for batches that are worth it).

    Raises UserError for an unknown backend.
    """
    for backend in backends:
        if backend not in BACKENDS:
            raise UserError(f"Unknown backend {backend!r} of the energy benchmark: choose of {', '.join(BACKENDS)}.")
    rows = []
    total = len(molecules) * len(backends) * len(batch_sizes)
    with tqdm(total=total, desc="energy", unit="case") as bar:
        for label, keywords in molecules.items():
            settings = dict(keywords)
            name = settings.pop("system")
            for backend in backends:
                system = load_system(name, **settings, **BACKENDS[backend])
                for size in batch_sizes:
                    x = _conformers(system.positions, size, seed).to(device=device, dtype=getattr(torch, dtype))
                    for kind in KINDS:
                        timing = time_call(lambda: _evaluate(system, x, kind), min_seconds)  # noqa: B023 (called at once)
                        rows.append(
                            {"molecule": label, "n_atoms": system.n_atoms, "backend": backend}
                            | {"batch_size": size, "kind": kind}
                            | timing.per(size)
                        )
                    bar.update()
    return rows


def _conformers(structure: Tensor, n: int, seed: int) -> Tensor:
    noise = torch.randn((n, *structure.shape), generator=torch.Generator().manual_seed(seed))
    return structure + THERMAL_NOISE * noise


def _evaluate(system, x: Tensor, kind: str) -> Tensor:
    if kind == "energy":
        with torch.no_grad():
            return system.energy(x)
    leaf = x.detach().requires_grad_()
    return torch.autograd.grad(system.energy(leaf).sum(), leaf)[0]


def energy_table(rows: Sequence[Mapping]) -> str:
    """Markdown: lines for molecules, batch sizes and kinds; of backends and, in CPU time, OpenMM over the best."""
    backends = list(dict.fromkeys(row["backend"] for row in rows))
    cells = {(r["molecule"], r["batch_size"], r["kind"], r["backend"]): r for r in rows}
    lines = [
        "| molecule | atoms | batch | kind | " + " | ".join(f"{b} (µs)" for b in backends) + " | OpenMM / torch |",
        "|---" * (5 + len(backends)) + "|",
    ]
    for molecule, size, kind in dict.fromkeys(key[:3] for key in cells):
        here = {b: cells[molecule, size, kind, b] for b in backends}
        values = [f"{r['median']:.1f} [{r['low']:.1f}, {r['high']:.1f}]" for r in here.values()]
        others = [r["work"] for b, r in here.items() if b != "openmm"]
        ratio = f"{here['openmm']['work'] / min(others):.1f}" if "openmm" in here and others else "-"
        n_atoms = next(iter(here.values()))["n_atoms"]
        lines.append(f"| {molecule} | {n_atoms} | {size} | {kind} | " + " | ".join(values) + f" | {ratio} |")
    return "\n".join([*lines, "", *_growth(rows)])


def _growth(rows: Sequence[Mapping]) -> list[str]:
    """How the largest batch's time grows with the number of atoms: the exponent, from a line through logarithms."""
    size = max(row["batch_size"] for row in rows)
    lines = []
    for backend, kind in dict.fromkeys((row["backend"], row["kind"]) for row in rows):
        here = [row for row in rows if (row["batch_size"], row["backend"], row["kind"]) == (size, backend, kind)]
        atoms, times = ([row[key] for row in here] for key in ("n_atoms", "median"))
        if len(set(atoms)) > 1:
            power = np.polyfit(np.log(atoms), np.log(times), 1)[0]
            lines.append(f"- {backend}, {kind}, batch {size}: time grows as atoms^{power:.2f}")
    return lines


def energy_figure(rows: Sequence[Mapping]) -> Figure:
    """µs a conformer over the number of atoms at the largest batch, a panel for each kind."""
    size = max(row["batch_size"] for row in rows)
    return plot_energy_cost([row for row in rows if row["batch_size"] == size])
