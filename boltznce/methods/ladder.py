"""What a run of spline flows at several temperatures adds.

Draws at each of them, and sections on the ladder and on exact densities.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from omegaconf import OmegaConf

from boltznce.analysis import plotting
from boltznce.analysis.metrics import held_out_likelihood, torsion_kl_of_halves
from boltznce.analysis.reweighting import WeightedSamples
from boltznce.analysis.weights import normalized_weights
from boltznce.command_line import command_line
from boltznce.data.dataset import Dataset
from boltznce.methods.drawing import draw_to_folder
from boltznce.methods.evaluation import evaluate
from boltznce.methods.findings import Findings, gather
from boltznce.methods.live import learning_curves
from boltznce.methods.report import curves_figure, make_report
from boltznce.methods.sections import COMMON, Part, ess_row
from boltznce.methods.workspace import Workspace
from boltznce.systems.base import System

__all__ = ["evaluate_ladder", "report_ladder"]

SPENT_ON = {
    "hot": "first temperature",
    "fab": "annealed draws",
    "annealing": "annealing",
    "data": "simulation of the training data",
}
LOSSES = {  # by objective: columns of the log, what they are
    "reverse_kl": {"loss": "reverse KL (kT)", "energy": "mean energy of the draws (kT)"},
    "forward_kl": {"loss": "forward KL, -log q"},
    "alpha_divergence": {"loss": "α-divergence, -log q by weight"},
    "log_variance": {"variance": "variance of log p - log q"},
    "path_kl": {"variance": "variance of log p - log q"},
}


def evaluate_ladder(work: Workspace) -> dict:
    """Some draws of every flow of the run but the last at its own temperature; then weighted draws of the last one."""
    (member,) = work.system.members("test")
    for name in list(work.models.flows)[:-1]:
        generator, n = work.models.of(member, name), work.config.evaluation.n_ladder
        meta = {"temperature": generator.system.temperature}
        folder, stream = work.folder.leave(work.samples(name, member)), f"samples {name}"
        draw_to_folder(generator, folder, n, "exact", lambda k, s=stream: work.generator(s, member, k), meta=meta)
    return evaluate(work)


def report_ladder(work: Workspace) -> dict:
    """The common report, with what concerns temperatures and exact densities."""
    sections = (*COMMON, marginals, torsion_divergences, held_out, ladder, temperatures)
    counts = {"counts": _energy_evaluations(work)}
    of_run = Part(counts, curves_figure(work, *_learning_curves(work)), _notes(work))
    return make_report(work, sections, _settings(work), _find, of_run)


def _find(work: Workspace, member: System) -> Findings:
    found, models = gather(work, member), work.models
    names = list(models.flows)[:-1]
    flows = [(models.flows[name], WeightedSamples.load(work.samples(name, member))) for name in names]
    log_prob = None
    if found.data is not None:
        positions = torch.from_numpy(np.array(found.data.frames.positions))
        log_prob = models.of(member).log_prob(positions).cpu().numpy()
    return replace(found, flows=tuple(flows), steps=tuple(_steps(work)), frames_log_prob=log_prob)


def _steps(work: Workspace) -> list[dict]:
    return work.folder.stages.get("annealing", {}).get("steps", [])


# ---- sections -------------------------------------------------------------------------------------------------------


def marginals(f: Findings) -> Part:
    """Densities of every pair of torsions."""
    figures = {}
    for view in f.views:
        if view.periodic and len(view.symbols) == 2:  # of one the view itself is the marginal
            name = view.figure.replace("ramachandran", "marginals").replace("torsions", "marginals")
            figures[name] = plotting.plot_marginals(f.panels(view.points), view.symbols)
    return Part({}, figures)


def torsion_divergences(f: Findings) -> Part:
    """KL between the torsions of every view of the data and of the flow, (φ, ψ) of a residue."""
    views = [view for view in f.views if view.periodic]
    if f.data is None or not views:
        return Part()
    frames, rows = f.data.frames, {}
    shares, first = normalized_weights(frames.log_weights), _first_half(frames)
    for view in views:
        angles, ours = view.points(frames.positions), view.points(f.samples.positions)
        rows[f"KL of ({', '.join(view.symbols)})"] = {
            "unweighted": torsion_kl_of_halves(angles, shares, first, ours),
            "weighted": torsion_kl_of_halves(angles, shares, first, ours, f.samples.weights),
            "floor": torsion_kl_of_halves(angles, shares, first),
        }
    note = (
        "KL: mean over two independent halves of the MD of KL(half ‖ flow), on 100 bins along each torsion, each "
        "histogram mixed with 1e-4 of the uniform. The floor is that between the halves. Of the flow's samples so many "
        "are taken that their histogram is as noisy as that of a half: value and floor have the same noise."
    )
    return Part({"distances": rows}, {}, (note,))


def held_out(f: Findings) -> Part:
    """Likelihood that the flow gives the data."""
    if f.data is None:
        return Part()
    log_weights = f.data.frames.log_weights
    effective = 1 / np.square(normalized_weights(log_weights)).sum()
    note = (
        f"Distances, divergences and NLL are to {len(log_weights)} {f.data_name} points ({effective:.0f} effective) "
        + ("drawn exactly." if f.system.exact else "that the flow was not trained on.")
    )
    rows = {f"flow at {f.system.temperature:g}": held_out_likelihood(f.frames_log_prob, log_weights)}
    return Part({"held_out": rows}, {}, (note,))


def ladder(f: Findings) -> Part:
    """ESS of every flow at its own temperature, and weighted from the one before, with and without clipping."""
    if not f.flows:
        return Part()
    flows = _numbered([f"flow of {t:.4g}" for t, _ in f.flows])
    rows = {
        f"{name}, at its own temperature": ess_row(drawn.log_weights)
        for name, (_, drawn) in zip(flows, f.flows, strict=True)
    }
    steps = _numbered([f"ladder, {step['drawn_at']:.4g} to {step['weighted_to']:.4g}" for step in f.steps])
    for name, step in zip(steps, f.steps, strict=True):
        rows[name] = {"ess": step["ess"], "pareto_k": step["pareto_k"], "n": step["n_draws"]}
    sets = {"trained flow, at its own temperature": [samples.ess for _, samples in f.flows] + [f.drawn.ess]}
    sets["draws from the step before, weighted"] = [np.nan, *(step["ess"] for step in f.steps)]
    if any(step["ess_clipped"] != step["ess"] for step in f.steps):
        sets["the same, top weights clipped"] = [np.nan, *(step["ess_clipped"] for step in f.steps)]
    all_temperatures = [*(t for t, _ in f.flows), f.system.temperature]
    figure = plotting.plot_ladder(all_temperatures, sets, f.system.temperature_unit)
    return Part({"ess": rows}, {"ladder": figure})


def temperatures(f: Findings) -> Part:
    """The flow at every temperature of the ladder, the same number of draws at each, and the data, over one view."""
    if not f.flows or not f.views:
        return Part()
    view, final = f.views[0], f"{_short(f.system)}, final"
    sets = {_short(f.system, t): samples for t, samples in f.flows} | {final: f.samples}
    n, zero = min(map(len, sets.values())), final
    points = {name: (view.points(samples.positions[:n]), None) for name, samples in sets.items()}
    if f.data is not None:
        zero = f"{f.data_name}, {_short(f.system)}"
        points[zero] = (view.points(f.data.frames.positions), f.data.frames.log_weights)
    return Part({}, {"temperatures": view.draw(points, n_bins=48, zero_of=zero)})


def _first_half(frames: Dataset) -> np.ndarray:
    """Mask of one of two independent halves: half of the repeats, or of the time where there is one repeat."""
    repeats = np.unique(frames.repeat)
    if len(repeats) > 1:
        return np.isin(frames.repeat, repeats[: len(repeats) // 2])
    return frames.time <= np.median(frames.time)


def _numbered(names: Sequence[str]) -> list[str]:
    """Names with a number where one has come before: several flows of a ladder may have one temperature.

    >>> _numbered(["flow of 1200", "flow of 1200", "flow of 300"])
    ['flow of 1200', 'flow of 1200 (2)', 'flow of 300']
    """
    counts = [names[: k + 1].count(name) for k, name in enumerate(names)]
    return [name if count == 1 else f"{name} ({count})" for name, count in zip(names, counts, strict=True)]


def _short(system: System, temperature: float | None = None) -> str:
    t = system.temperature if temperature is None else temperature
    return f"{t:.0f} {system.temperature_unit}".strip() if t >= 100 else f"{t:.3g} {system.temperature_unit}".strip()


# ---- what concerns the whole run ------------------------------------------------------------------------------------


def _energy_evaluations(work: Workspace) -> dict[str, int]:
    """Those of every stage of the training, their sum, and those that the evaluation took."""
    stages, section = work.folder.stages, work.config.evaluation
    spent = {name: record["energy_evaluations"] for name, record in stages.items() if "energy_evaluations" in record}
    counts = {f"energy evaluations, {SPENT_ON.get(stage, stage)}": n for stage, n in spent.items()}
    n_drawn = section.n_samples + section.n_ladder * (len(work.models.flows) - 1)
    return counts | {
        "energy evaluations, training in all": sum(spent.values()),
        "energy evaluations, this evaluation": n_drawn,
        "weighted samples": section.n_samples,
    }


def _settings(work: Workspace) -> dict[str, str]:
    config = work.config
    settings = {key: str(value) for key, value in OmegaConf.to_container(config.generator.model, resolve=True).items()}
    for stage in ("hot", "flow", "fab", "annealing"):
        record = work.folder.stages.get(stage)
        if record:
            steps = (
                sum(step["steps"] for step in record["steps"]) if isinstance(record["steps"], list) else record["steps"]
            )
            settings[f"{stage}, training"] = f"{steps} steps of {config[stage].batch_size}"
    return settings | {"temperatures": ", ".join(f"{t:.4g}" for t in work.models.flows.values())}


def _notes(work: Workspace) -> tuple[str, ...]:
    system, folder = work.system, work.config.data.folder
    (member,) = system.members("test")
    if system.exact or "data" in work.folder.stages or (folder is not None and work.frames_exist(member)):
        return ()
    simulate = command_line("simulate", f"system={system.name}", f"data_dir={work.config.data_dir}")
    resume = command_line("train", f"resume={work.folder.path}")
    note = (
        f"There are no data of this system at this temperature in {folder}, so that NLL and divergences are missing: "
        f"`{simulate}` makes them, and `{resume}` writes this report anew."
    )
    return (note,)


def _learning_curves(work: Workspace) -> tuple[Mapping[str, Mapping[str, str]], Mapping[str, tuple]]:
    """Which losses of which stages are drawn, and those of the ladder's, one after another."""
    config, folder = work.config, work.folder.path
    objectives = {"flow": "forward_kl", "fab": "alpha_divergence", "hot": config.hot.objective}
    named = {stage: {c: f"{stage}: {what}" for c, what in LOSSES[o].items()} for stage, o in objectives.items()}
    column, what = next(iter(LOSSES[config.annealing.objective].items()))
    joined, start = ([], []), 0
    for number, step in enumerate(_steps(work)):
        name = f"anneal_{number:02d}"
        for steps, values in learning_curves(folder, {name: {column: name}}).values():
            joined[0].extend(start + at for at in steps)
            joined[1].extend(values)
        start += step["steps"]
    return named, ({f"annealing: {what}/train": joined} if joined[0] else {})
