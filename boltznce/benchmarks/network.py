"""Milliseconds a step of networks for many molecules: padded batches of unlike ones against batches of equal sizes."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import nn
from tqdm.auto import tqdm

from boltznce.analysis.plotting import plot_energy_cost
from boltznce.benchmarks.timing import time_call
from boltznce.config import build, load_system
from boltznce.data.batching import Batches
from boltznce.ebm import EnergyBasedModel
from boltznce.flows.interpolant_flow import InterpolantFlow
from boltznce.molecules import Molecules

__all__ = ["measure_network", "network_figure", "network_table"]

KINDS = ("forward", "training step")


def measure_network(
    family: Mapping[str, Any],
    networks: Mapping[str, Mapping[str, Any]],
    *,
    batch_size: int,
    max_padding: float,
    device: str | torch.device = "cpu",
    min_seconds: float = 1.0,
    seed: int = 0,
) -> list[dict]:
    """One row a network and kind: ms a step (`Timing.work`) on padded batches and on the same rows in equal sizes.

    Args:
        family: ``system``, the name of a family of peptides, and settings in place of its own; its training peptides
            are measured, all in as many frames.
        networks: label -> config of a network. Those with a label ``ebm...`` are energies, the others vector fields.
        max_padding: largest share of padding in a row, see `Batches`; the batches of one epoch are measured in turn.

    What equal sizes cost is the mean, over rows of padded batches, of what a row of a batch of that molecule takes.
    """
    peptides = load_system(family["system"], **{key: value for key, value in family.items() if key != "system"})
    members = peptides.members("train")
    generator = torch.Generator(device).manual_seed(seed)
    rng = np.random.default_rng(seed)
    positions = [rng.normal(scale=0.3, size=(batch_size, member.n_atoms, 3)).astype(np.float32) for member in members]
    features = [member.features for member in members]
    batches = Batches(positions, features, batch_size, seed, max_padding=max_padding)
    padded = [batches(step) for step in range(batches.steps_per_epoch)]
    examples = {member.n_atoms: k for k, member in enumerate(members)}
    rows = []
    with tqdm(total=len(networks) * len(KINDS), desc="network", unit="case") as bar:
        for label, settings in networks.items():
            torch.manual_seed(seed)
            network = build(settings, nn.Module, {"n_features": peptides.n_features}).to(device)
            calls = _calls(network, label.startswith("ebm"), max(examples), generator)
            for kind in KINDS:
                equal = {}
                for n, k in examples.items():
                    molecules = Molecules.stack(features, [k] * batch_size, n).to(device)
                    x = torch.from_numpy(positions[k]).to(device)
                    equal[n] = time_call(partial(calls[kind], x, molecules), min_seconds).work
                times, expected = [], []
                for x, molecules in padded:
                    x, molecules = x.to(device), molecules.to(device)
                    times.append(time_call(partial(calls[kind], x, molecules), min_seconds).work)
                    expected.append(np.mean([equal[n] for n in molecules.n_atoms.tolist()]))
                share = 1 - sum(int(m.n_atoms.sum()) for _, m in padded) / sum(m.mask.numel() for _, m in padded)
                rows.append(
                    {
                        "network": label,
                        "kind": kind,
                        "n_parameters": sum(p.numel() for p in network.parameters()),
                        "batch_size": batch_size,
                        "padding": share,
                        "padded_ms": 1e3 * float(np.mean(times)),
                        "equal_ms": 1e3 * float(np.mean(expected)),
                        "cost": float(np.mean(times) / np.mean(expected) - 1),
                        "by_size": {str(n): 1e3 * seconds for n, seconds in sorted(equal.items())},
                    }
                )
                bar.update()
    return rows


def _calls(network: nn.Module, is_energy: bool, largest: int, generator: torch.Generator) -> dict[str, Callable]:
    model = (EnergyBasedModel if is_energy else InterpolantFlow)(network, largest, length_scale=0.1)
    model.to(generator.device)

    def forward(x: torch.Tensor, molecules: Molecules) -> None:
        with torch.no_grad():
            network(10 * x, x.new_full((len(x),), 0.5), molecules.features, molecules.mask)

    def step(x: torch.Tensor, molecules: Molecules) -> None:
        network.zero_grad()
        loss = model.on(molecules).loss(x, generator)
        (loss["loss"] if is_energy else loss).backward()

    return dict(zip(KINDS, (forward, step), strict=True))


def network_table(rows: Sequence[Mapping]) -> str:
    """Markdown: a line for each network and kind."""
    lines = ["| network | parameters | what | padded (ms) | equal sizes (ms) | cost of padding |", "|---" * 6 + "|"]
    for r in rows:
        times = f"{r['padded_ms']:.1f} | {r['equal_ms']:.1f} | {r['cost']:+.1%}"
        lines.append(f"| {r['network']} | {r['n_parameters']:,} | {r['kind']} | {times} |")
    return "\n".join([*lines, "", f"Batches of {rows[0]['batch_size']}, {rows[0]['padding']:.1%} of them padding."])


def network_figure(rows: Sequence[Mapping]) -> Figure:
    """µs a sample over the number of atoms, for batches of equal sizes: panels for kinds, lines for networks."""
    points = [
        {"molecule": n, "n_atoms": int(n), "backend": row["network"]}
        | {key: row[key] for key in ("kind", "batch_size")}
        | dict.fromkeys(("median", "low", "high"), 1e3 * ms / row["batch_size"])
        for row in rows
        for n, ms in row["by_size"].items()
    ]
    return plot_energy_cost(points)
