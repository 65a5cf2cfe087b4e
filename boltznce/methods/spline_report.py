"""The last stages of a run with a spline flow (TA-BG and its baselines): weighted samples with exact likelihoods, and the report."""

import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from omegaconf import OmegaConf

from boltznce.analysis import plotting
from boltznce.analysis.free_energy import free_energy_difference, free_energy_profile
from boltznce.analysis.metrics import held_out_likelihood, torsion_kl_of_halves
from boltznce.analysis.report import write_report
from boltznce.analysis.reweighting import WeightedSamples, normalized_weights
from boltznce.data.dataset import Dataset
from boltznce.methods.drawing import draw_to_folder
from boltznce.methods.free_energy import reference_difference, reference_profile, state_in_words
from boltznce.methods.report_parts import (
    allowed_conformers,
    data_difference,
    ess_row,
    excluded_conformers,
    learning_curves,
    mode_weights,
    resampled,
    wasserstein_distances,
)
from boltznce.methods.spline_models import SplineModels
from boltznce.methods.views import view_of
from boltznce.methods.workspace import Workspace
from boltznce.systems.base import System

__all__ = ["evaluate", "report"]

SPENT_ON = {"hot": "first temperature", "annealing": "annealing", "data": "simulation of the training data"}
LOSSES = {  # by objective: columns of the log, what they are
    "reverse_kl": {"loss": "reverse KL (kT)", "energy": "mean energy of the draws (kT)"},
    "forward_kl": {"loss": "forward KL, -log q"},
    "log_variance": {"variance": "variance of log p - log q"},
    "path_kl": {"variance": "variance of log p - log q"},
}
CAPTIONS = {
    "ladder": "Effective sample size along the ladder: of each flow's draws weighted to the next temperature, and at their own.",
    "temperatures": "Free energy of the flow at each temperature of the ladder, not weighted; equal colours are equal densities.",
    "marginals": "Marginal probability densities of the backbone torsions.",
}


def evaluate(work: Workspace) -> dict:
    """Weighted draws of the last flow, and some of every other flow of the run at its own temperature."""
    section, models = work.config.evaluation, work.models
    *others, _ = models.flows
    for name in others:
        _draw(work, models.named(name), name, section.n_ladder)
    _draw(work, models, "weighted", section.n_samples)
    return {"seconds_per_sample": _seconds_per_sample(work, section.batch_size)}


def report(work: Workspace) -> dict:
    """Compute every number of the report from what is on disk, draw the figures, and write both."""
    found = _gather(work)
    results = _results(work, found)
    write_report(work.folder.path, results, _figures(work, found), CAPTIONS)
    return {}


# ---- draws ------------------------------------------------------------------------------------------------------------


def _draw(work: Workspace, models: SplineModels, name: str, n: int) -> None:
    folder, temperature = work.folder.path / "samples" / name, models.system.temperature
    draw_to_folder(models, folder, n, "exact", lambda k: work.generator(f"samples {name}", k), meta={"temperature": temperature})


def _seconds_per_sample(work: Workspace, n: int) -> float:
    """Of a draw with its log q, in a batch of ``n``; its energy is not in it."""
    flow = work.models.flow
    flow.sample(n, work.generator("timing"))
    begun = time.perf_counter()
    flow.sample(n, work.generator("timing"))[1].cpu()
    return (time.perf_counter() - begun) / n


# ---- what there is ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Found:
    """Draws and data of a report: all of them, those left out and why (masks), and the others."""

    system: System  # at the temperature of the last flow
    drawn: WeightedSamples
    excluded: dict[str, np.ndarray]
    data: Dataset | None
    data_excluded: dict[str, np.ndarray]

    @cached_property
    def samples(self) -> WeightedSamples:
        return self.drawn[allowed_conformers(self.excluded, len(self.drawn))]

    @cached_property
    def frames(self) -> Dataset | None:
        return self.data and self.data.take(allowed_conformers(self.data_excluded, len(self.data)))


def _gather(work: Workspace) -> _Found:
    system, drawn, data = work.models.system, WeightedSamples.load(work.folder.path / "samples" / "weighted"), _data(work)
    excluded = excluded_conformers(system, drawn.positions)
    return _Found(system, drawn, excluded, data, excluded_conformers(system, data.positions) if data else {})


def _data(work: Workspace) -> Dataset | None:
    """What the flow is compared with: frames that it was not trained on, exact draws in the plane, or None where there are none."""
    system, section, n = work.models.system, work.config.data, work.config.evaluation.n_reference
    if hasattr(system, "sample"):
        x = system.sample(n, work.generator("exact draws")).cpu()
        zeros, order = np.zeros(n), np.arange(n)
        return Dataset(x.numpy(), system.energy(x).double().numpy(), zeros, order, zeros, order % 2, None, {})
    if section.folder is None or not (Path(section.folder) / "meta.yaml").exists():
        return None
    if work.dataset.meta.get("settings", {}).get("temperature", system.temperature) != system.temperature:
        return None
    frames = work.dataset if section.split is None else work.dataset.split(**section.split)[2]
    return frames.take(np.linspace(0, len(frames) - 1, min(n, len(frames))).astype(int))


def _first_half(frames: Dataset) -> np.ndarray:
    """Mask of one of two independent halves: half of the repeats, or the first half of the time where there is one repeat."""
    repeats = np.unique(frames.repeat)
    if len(repeats) > 1:
        return np.isin(frames.repeat, repeats[: len(repeats) // 2])
    return frames.time <= np.median(frames.time)


# ---- numbers ----------------------------------------------------------------------------------------------------------


def _results(work: Workspace, found: _Found) -> dict:
    config, stages, system = work.config, work.folder.stages, found.system
    results = {
        "system": system.name,
        "method": config.method.name,
        "budget": config.budget,
        "ess": _effective_sizes(work, found),
        "excluded": _excluded(found),
        "modes": mode_weights(system, found.samples),
        "timing": {
            "exact_per_sample": stages["evaluation"]["seconds_per_sample"],
            "stages": {stage: record["seconds"] for stage, record in stages.items() if stage != "report"},
            "peak_memory_mib": max(record["peak_memory"] for record in stages.values()),
        },
        "counts": _energy_evaluations(work) | {"weighted samples": len(found.drawn)},
        "settings": _settings(work),
        "notes": _notes(work, found),
    }
    if system.state is not None:
        name, state = system.state
        results["state"] = state_in_words(view_of(system).symbols.get(name, name), state)
        results["free_energy"] = _free_energies(work, found)
    if found.data is not None:
        results |= _comparison(work, found)
    return results


def _effective_sizes(work: Workspace, found: _Found) -> dict:
    clip, drawn = work.config.evaluation.clip, found.drawn
    rows = {"exact weights": ess_row(drawn.log_weights), f"exact weights, top {clip:.2%} clipped": ess_row(drawn.clip(clip).log_weights)}
    *others, _ = work.models.flows
    for name in others:
        rows[f"flow of {work.models.flows[name]:.4g}, at its own temperature"] = ess_row(_of_step(work, name).log_weights)
    for step in _ladder_steps(work):
        row = {"ess": step["ess"], "pareto_k": step["pareto_k"], "n": step["n_draws"]}
        rows[f"ladder, {step['drawn_at']:.4g} to {step['weighted_to']:.4g}"] = row
    return rows


def _excluded(found: _Found) -> dict[str, dict]:
    """Shares of what is left out, by count and by weight; of the data by weight."""
    weights = found.drawn.weights
    shares = {
        why: {"n": int(mask.sum()), "by_count": float(mask.mean()), "by_weight": float(weights[mask].sum())}
        for why, mask in found.excluded.items()
    }
    if found.data is not None:
        weights = normalized_weights(found.data.log_weights)
        for why, mask in found.data_excluded.items():
            shares[why]["data"] = float(weights[mask].sum())
    return shares


def _energy_evaluations(work: Workspace) -> dict[str, int]:
    """Those of every stage of the training, their sum, and those that the evaluation took."""
    spent = {stage: record["energy_evaluations"] for stage, record in work.folder.stages.items() if "energy_evaluations" in record}
    counts = {f"energy evaluations, {SPENT_ON.get(stage, stage)}": n for stage, n in spent.items()}
    section = work.config.evaluation
    n_drawn = section.n_samples + section.n_ladder * (len(work.models.flows) - 1)
    return counts | {"energy evaluations, training in all": sum(spent.values()), "energy evaluations, this evaluation": n_drawn}


def _free_energies(work: Workspace, found: _Found) -> dict:
    """ΔF of the system's state, conditional on the conformers that are kept."""
    system, samples, config = found.system, found.samples, work.config
    name, state = system.state
    angle, reference = system.coordinate(np.asarray(samples.positions), name), system.reference()
    bootstrap = {"n_bootstrap": config.evaluation.n_bootstrap, "seed": config.seed}
    rows = {"reference": reference_difference(reference)} if reference else {}
    rows |= {
        "exact": free_energy_difference(angle, samples.log_weights, state, **bootstrap),
        "unweighted": free_energy_difference(angle, None, state, **bootstrap),
    }
    if found.data is not None:
        label = f"{view_of(system).data}, error not estimated"
        angle = system.coordinate(np.asarray(found.frames.positions), name)
        rows[label] = data_difference(found.frames.log_weights, angle, state)
    return rows


def _comparison(work: Workspace, found: _Found) -> dict:
    """Distances to the data, their likelihood under the flow, and how many they are."""
    section, system, samples, frames = work.config.evaluation, found.system, found.samples, found.frames
    results, view = {"distances": {}}, view_of(system)
    if _has_points(system):
        data = resampled(frames, view, min(len(frames), len(samples)), work.numpy_generator("held out"))
        results["distances"], results["energy_cut"] = wasserstein_distances(view, samples, data, section.n_torus, work.config.seed)
    weights, first = normalized_weights(frames.log_weights), _first_half(frames)
    for names, symbols in _torsion_pairs(system):
        angles = _torsions(system, frames.positions, names)
        theirs = _torsions(system, samples.positions, names)
        results["distances"][f"KL of ({', '.join(symbols)})"] = {
            "unweighted": torsion_kl_of_halves(angles, weights, first, theirs),
            "weighted": torsion_kl_of_halves(angles, weights, first, theirs, samples.weights),
            "floor": torsion_kl_of_halves(angles, weights, first),
        }
    nll = held_out_likelihood(work.models.log_prob(frames.positions), frames.log_weights)
    return results | {"held_out": {f"flow at {system.temperature:g}": nll}}


def _settings(work: Workspace) -> dict[str, str]:
    config = work.config
    settings = {key: str(value) for key, value in OmegaConf.to_container(config.generator.model, resolve=True).items()}
    for stage in ("hot", "flow", "annealing"):
        record = work.folder.stages.get(stage)
        if record:
            steps = sum(step["steps"] for step in record["steps"]) if isinstance(record["steps"], list) else record["steps"]
            settings[f"{stage}, training"] = f"{steps} steps of {config[stage].batch_size}"
    return settings | {"temperatures": ", ".join(f"{t:.4g}" for t in work.models.flows.values()), "seed": str(config.seed)}


def _notes(work: Workspace, found: _Found) -> list[str]:
    system, folder = found.system, work.config.data.folder
    notes = list(view_of(system).notes)
    if found.data is not None:
        frames = found.frames
        effective = 1 / np.square(normalized_weights(frames.log_weights)).sum()
        notes.append(
            f"Distances, divergences and NLL are to {len(frames)} {view_of(system).data} points ({effective:.0f} effective ones) "
            + ("that the flow was not trained on." if system.dim == 3 else "drawn exactly.")
        )
    if system.dim == 3:
        notes.append(
            "log q is normalized modulo rigid motion, on the domain of the internal coordinates (one hand, one labelling of equivalent "
            "hydrogens): an NLL is comparable with those of such flows only."
        )
        if found.data is not None:
            notes.append(
                "KL: mean over two independent halves of the MD of KL(half ‖ flow), on 100 x 100 bins, each histogram mixed with 1e-4 of "
                "the uniform. The floor is that between the halves. Of the flow's samples so many are taken that their histogram is as "
                "noisy as that of a half: value and floor have the same noise."
            )
        else:
            notes.append(
                f"There are no MD data of this system at this temperature in {folder}, so that NLL and divergences are missing: "
                f"`python scripts/simulate.py system={system.name} data_dir={work.config.data_dir}` makes them, and "
                f"`python scripts/train.py resume={work.folder.path}` writes this report anew."
            )
        if system.reference() is None:
            notes.append("No reference ships for this system at this temperature and with this force field.")
    return notes


# ---- figures ----------------------------------------------------------------------------------------------------------


def _figures(work: Workspace, found: _Found) -> dict[str, Figure]:
    system, samples, frames, view = found.system, found.samples, found.frames, view_of(found.system)
    figures = {"weights": plotting.plot_weights({"exact": found.drawn.log_weights})}
    curves = _learning_curves(work)
    if curves:
        figures["learning_curves"] = plotting.plot_learning_curves(curves)
    if system.state is not None:
        figures["profile"] = _profile(system, samples)
    data = {} if frames is None else {view.data: frames}
    panels = data | {"flow": _unweighted(samples), "flow, weighted": samples}
    energies = {label: (_energy(part), part.log_weights) for label, part in panels.items()}
    if data:
        figures["energy_histograms"] = plotting.plot_energy_histograms(energies)
    if system.dim == 2:
        figures[view.figure] = view.draw({label: (view.points(part.positions), part.log_weights) for label, part in panels.items()})
    for number, (names, symbols) in enumerate(_torsion_pairs(system), start=1):
        points = {label: (_torsions(system, part.positions, names), part.log_weights) for label, part in panels.items()}
        suffix = "" if number == 1 else str(number)
        figures[f"ramachandran{suffix}"] = plotting.plot_ramachandran(points, angle_names=symbols)
        figures[f"marginals{suffix}"] = plotting.plot_marginals(points, symbols)
    if len(work.models.flows) > 1:
        figures["ladder"] = _ladder(work)
        figures |= _temperatures(work, found)
    return figures


def _profile(system: System, samples: WeightedSamples) -> Figure:
    name, state = system.state
    view, limits = view_of(system), system.coordinate_range(name)
    angle = system.coordinate(np.asarray(samples.positions), name)
    curves = {"flow, unweighted": None, "exact weights": samples.log_weights}
    return plotting.plot_profiles(
        {label: free_energy_profile(angle, log_weights, 72, limits=limits) for label, log_weights in curves.items()},
        reference_profile(system.reference()),
        state,
        angle_name=view.symbols.get(name, name),
        highest=view.highest,
        limits=limits,
    )


def _ladder(work: Workspace) -> Figure:
    """ESS of every flow at its own temperature, and weighted from the one before, with and without clipping."""
    flows, steps = work.models.flows, _ladder_steps(work)
    *others, _ = flows
    own = [_of_step(work, name).ess for name in others] + [WeightedSamples.load(work.folder.path / "samples" / "weighted").ess]
    sets = {"trained flow, at its own temperature": own}
    if len(steps) == len(flows) - 1:
        sets["draws from the step before, weighted"] = [np.nan, *(step["ess"] for step in steps)]
        if work.config.annealing.clip:
            sets[f"the same, top {work.config.annealing.clip:.2%} clipped"] = [np.nan, *(step["ess_clipped"] for step in steps)]
    return plotting.plot_ladder(list(flows.values()), sets, "K" if work.system.dim == 3 else "")


def _learning_curves(work: Workspace) -> dict[str, tuple[list[float], list[float]]]:
    """Training losses of the stages there are; of the ladder's one after another."""
    config, folder = work.config, work.folder.path
    objectives = {"flow": "forward_kl", "hot": config.hot.objective}
    curves = learning_curves(folder, {stage: {c: f"{stage}: {what}" for c, what in LOSSES[o].items()} for stage, o in objectives.items()})
    column, what = next(iter(LOSSES[config.annealing.objective].items()))
    joined, start = ([], []), 0
    for number, step in enumerate(_ladder_steps(work)):
        name = f"anneal_{number:02d}"
        for steps, values in learning_curves(folder, {name: {column: name}}).values():
            joined[0].extend(start + at for at in steps)
            joined[1].extend(values)
        start += step["steps"]
    return curves | ({f"annealing: {what}/train": joined} if joined[0] else {})


def _temperatures(work: Workspace, found: _Found) -> dict[str, Figure]:
    """The flow at every temperature of the ladder, and the data."""
    system, view = found.system, view_of(found.system)
    unit = " K" if system.dim == 3 else ""
    *others, _ = work.models.flows
    if not _has_points(system):
        return {}
    panels = {f"{_short(work.models.flows[name])}{unit}": _of_step(work, name).positions for name in others}
    final = f"{_short(system.temperature)}{unit}, final"
    points = {title: (view.points(x), None) for title, x in (panels | {final: found.samples.positions}).items()}
    zero = final
    if found.frames is not None:
        zero = f"{view.data}, {_short(system.temperature)}{unit}"
        points[zero] = (view.points(found.frames.positions), found.frames.log_weights)
    return {"temperatures": view.draw(points, n_bins=48, zero_of=zero)}


# ---- small things -----------------------------------------------------------------------------------------------------


def _of_step(work: Workspace, name: str) -> WeightedSamples:
    return WeightedSamples.load(work.folder.path / "samples" / name)


def _ladder_steps(work: Workspace) -> list[dict]:
    return work.folder.stages.get("annealing", {}).get("steps", [])


def _torsion_pairs(system: System) -> list[tuple[tuple[str, str], tuple[str, str]]]:
    """Names and symbols of the (φ, ψ) of every residue that has both, from the N-terminus."""
    dihedrals, pairs = getattr(system, "dihedrals", {}), []
    for number in ("", *map(str, range(2, 1 + len(dihedrals)))):
        if {f"phi{number}", f"psi{number}"} <= set(dihedrals):
            pairs.append(((f"phi{number}", f"psi{number}"), (f"φ{number}", f"ψ{number}")))
    return pairs


def _has_points(system: System) -> bool:
    """Whether there is something to look at in two dimensions: the plane, or a φ and ψ."""
    return system.dim == 2 or bool(_torsion_pairs(system))


def _short(temperature: float) -> str:
    return f"{temperature:.0f}" if temperature >= 100 else f"{temperature:.3g}"


def _torsions(system: System, positions: np.ndarray, names: tuple[str, str]) -> np.ndarray:
    """Two torsions of positions, (n, 2)."""
    return np.stack([system.dihedral(np.asarray(positions), name) for name in names], axis=-1)


def _unweighted(samples: WeightedSamples) -> WeightedSamples:
    return WeightedSamples(samples.positions, samples.energy, samples.log_prob, np.zeros(len(samples)))


def _energy(part: WeightedSamples | Dataset) -> np.ndarray:
    return part.energies if isinstance(part, Dataset) else part.energy
