"""What the reports of all methods with a generator share: conformers left out, frames of the data, distances to them, learning curves."""

import csv
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from boltznce.analysis.free_energy import in_state
from boltznce.analysis.metrics import energy_cut, energy_w2, energy_w2_floor, share_above
from boltznce.analysis.pareto import pareto_k
from boltznce.analysis.report import summary_table
from boltznce.analysis.reweighting import WeightedSamples, effective_sample_size, normalized_weights
from boltznce.data.dataset import Dataset, boltzmann_indices
from boltznce.methods.views import View
from boltznce.methods.workspace import Workspace
from boltznce.systems.base import System
from boltznce.systems.symmetry import is_trans

__all__ = [
    "allowed_conformers",
    "data_difference",
    "ess_row",
    "excluded_conformers",
    "learning_curves",
    "mode_weights",
    "resampled",
    "summary",
    "wasserstein_distances",
]


def excluded_conformers(system: System, positions: np.ndarray) -> dict[str, np.ndarray]:
    """Masks (n,) of conformers that simulations at 300 K never visit, by why: free energies and distances are conditional on the others."""
    x = torch.from_numpy(np.array(positions))
    masks = {}
    if getattr(system, "omegas", ()):
        masks["cis peptide bond"] = ~is_trans(torch.stack([system.dihedral(x, name) for name in system.omegas], dim=-1)).numpy()
    if len(getattr(system, "stereocentres", ())):
        masks["inverted stereocentre"] = (system.chirality(x) < 0).any(dim=1).numpy()
    return masks


def allowed_conformers(excluded: Mapping[str, np.ndarray], n: int) -> np.ndarray:
    """Mask (n,) of what no mask of `excluded_conformers` holds."""
    return ~np.any([np.zeros(n, dtype=bool), *excluded.values()], axis=0)


def resampled(dataset: Dataset, view: View, n: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Energies (n,) and points (n, 2) of frames, resampled to the Boltzmann distribution and in order of time."""
    index = np.sort(boltzmann_indices(dataset.log_weights, n, rng))
    return {"energy": dataset.energies[index], "points": view.points(dataset.positions[index])}


def wasserstein_distances(
    view: View, samples: WeightedSamples, data: Mapping[str, np.ndarray], n_points: int, seed: int
) -> tuple[dict[str, dict], dict]:
    """E-W2 and W2 of the view's points between samples and ``data`` (see `resampled`), and the shares of energies above E-W2's cut."""
    cut = energy_cut(data["energy"])
    points = view.points(samples.positions)
    subsets = {"n_points": n_points, "generator": np.random.default_rng(seed)}
    distances = {
        "E-W2 (kT)": _energy_distances(samples, data["energy"], cut),
        view.distance: {
            "unweighted": view.w2(points, data["points"], **subsets),
            "weighted": view.w2(points, data["points"], samples.weights, **subsets),
            "floor": view.w2_floor(data["points"], **subsets),
        },
    }
    shares = {
        view.data: share_above(data["energy"], cut),
        "flow": share_above(samples.energy, cut),
        "weighted": share_above(samples.energy, cut, samples.weights),
    }
    return distances, {"cut": cut, "shares": shares}


def data_difference(log_weights: np.ndarray, angle: np.ndarray, state: tuple[float, float]) -> dict:
    """ΔF of the data themselves; its error is that of their slow motions, which so short a simulation does not show."""
    weights, inside = normalized_weights(log_weights), in_state(angle, state)
    with np.errstate(divide="ignore"):
        return {"value": float(np.log(weights[~inside].sum()) - np.log(weights[inside].sum()))}


def mode_weights(system: System, samples: WeightedSamples) -> dict[str, list[float]] | None:
    """Populations of the modes, where they are known."""
    if not hasattr(system, "mode_weights"):
        return None
    exact = system.mode_weights
    mode = system.mode(torch.from_numpy(np.array(samples.positions))).numpy()
    found = {"flow": None, "flow, weighted": samples.weights}
    shares = {name: np.bincount(mode, weights, minlength=len(exact)) for name, weights in found.items()}
    return {"exact": exact} | {name: counts / counts.sum() for name, counts in shares.items()}


def ess_row(log_weights: np.ndarray) -> dict:
    """ESS, Pareto-k and number of weights, as the report's table wants them."""
    return {"ess": effective_sample_size(log_weights), "pareto_k": pareto_k(log_weights), "n": len(log_weights)}


def learning_curves(folder: Path, wanted: Mapping[str, Mapping[str, str]]) -> dict[str, tuple[list[float], list[float]]]:
    """Training and validation losses of logs; ``wanted``: name of the log -> {its column: title}. Logs that are not there are left out."""
    curves = {}
    for name, losses in wanted.items():
        if not (folder / f"{name}.csv").exists():
            continue
        with open(folder / f"{name}.csv", newline="") as handle:
            rows = list(csv.DictReader(handle))
        for key, title in losses.items():
            for kind in ("train", "validation"):
                points = [(float(r["step"]), float(r[f"{kind}/{key}"])) for r in rows if r.get(f"{kind}/{key}")]
                if points:
                    curves[f"{title}/{kind}"] = tuple(zip(*points, strict=True))
    return curves


def summary(work: Workspace) -> str:
    """The report's main numbers as a table for the terminal."""
    return summary_table(json.loads((work.folder.path / "metrics.json").read_text())) + f"\n\nReport: {work.folder.path / 'report.md'}"


def _energy_distances(samples: WeightedSamples, data: np.ndarray, cut: float) -> dict:
    """E-W2 of the energies below the cut; NaN, and why, where a flow has nothing there."""
    distances, empty = {}, []
    for kind, weights in (("unweighted", None), ("weighted", samples.weights)):
        if share_above(samples.energy, cut, weights) < 1:
            distances[kind] = energy_w2(samples.energy, data, weights, cut=cut)
        else:
            distances[kind] = np.nan
            empty.append(kind)
    distances["floor"] = energy_w2_floor(data, cut=cut)
    if empty:
        lowest = samples.energy.min() if "unweighted" in empty else samples.energy[samples.weights > 0].min()
        distances["missing"] = (
            f"no {' and no '.join(empty)} sample below the cut at {cut:.0f} kT, above which energies are left out "
            f"(the lowest is at {lowest:.0f} kT)"
        )
    return distances
