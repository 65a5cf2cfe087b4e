"""TA-BG (arXiv 2501.19077): a spline flow trained on the energy alone at high temperature, then annealed.

Stages: hot -> annealing -> evaluation -> report. Each leaves its result in the run's folder, and a killed one goes on.
With a ladder of no steps (``annealing.n_steps=0``) it is the paper's baseline: reverse KL at the system's own
temperature, which loses modes.
"""

import json
from dataclasses import asdict, fields
from pathlib import Path

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from boltznce import ranks
from boltznce.analysis.reweighting import WeightedSamples
from boltznce.annealing import (
    BufferRecord,
    fill_buffer,
    forget_buffer,
    forward_kl,
    log_variance,
    path_kl,
    reverse_kl,
    soften,
    temperature_ladder,
)
from boltznce.checkpoint import weights_digest
from boltznce.errors import UserError
from boltznce.flows.spline_flow import SplineFlow
from boltznce.io import atomic_file
from boltznce.methods.ladder import evaluate_ladder, report_ladder
from boltznce.methods.models import load_trained, weights_path
from boltznce.methods.preflight import check_comparison, check_fit_of
from boltznce.methods.report import summary
from boltznce.methods.spline_models import SplineModels, make_spline_flow
from boltznce.methods.stages import minibatch
from boltznce.methods.workspace import Workspace
from boltznce.records import damaged, read_json, sealed
from boltznce.run_folder import AGAIN
from boltznce.systems.base import System
from boltznce.training import Loss

__all__ = ["STAGES", "anneal", "check", "ladder", "load_models", "summary", "train_hot"]


def check(config: DictConfig, system: System) -> None:
    """Raise UserError for what can be known to fail (see `preflight`)."""
    hot, annealing = config.hot, config.annealing
    for name in ("hot", "annealing"):
        check_fit_of(config[name], name, validates=False)
        if config[name].objective in ("reverse_kl", "path_kl"):
            system.require_gradient(f"{name}.objective={config[name].objective}")
    if not hot.drop_highest < hot.batch_size:
        raise UserError(f"hot.drop_highest={hot.drop_highest} must be below hot.batch_size={hot.batch_size}.")
    if not annealing.fit.steps:
        raise UserError("annealing.fit.steps=0 trains nothing: ask for one step or more, or set annealing.n_steps=0.")
    ladder(config)
    make_spline_flow(config, system)
    check_comparison(config, system)


def train_hot(work: Workspace) -> dict:
    """An untrained flow at the highest temperature, where no modes are separated.

    ``hot.objective`` says how: the paper's ``reverse_kl``, ``log_variance``, or ``path_kl``. A flow whose first draws
    all clash, as those of larger molecules do, gets no useful gradient from their energies, cut or not; log-variance
    ranks the draws, and gets out.
    """
    section = work.config.hot
    loss = _on_own_draws(section.objective, section, work.system.cheap.at_temperature(section.temperature))
    fitted = work.fit("hot", make_spline_flow(work.config, work.system), loss)
    return fitted | {"energy_evaluations": fitted["steps"] * section.batch_size}


def anneal(work: Workspace) -> dict:
    """Down the ladder: each stage draws from the flow so far, weights to the next temperature, and trains.

    ``annealing.objective`` says on what: the paper's ``forward_kl`` on those draws, resampled by their clipped weights;
    ``log_variance`` on fresh draws in every step, or ``path_kl``, by the energy's gradient at these. A finished stage
    is ``checkpoints/anneal_<k>.safetensors`` and its record, ``annealing/<k>.json``.
    """
    section, temperatures = work.config.annealing, ladder(work.config)
    flow, records, leavings = _trained(work, "hot"), [], _leavings(work, len(temperatures))
    for k, (hot, cold) in enumerate(temperatures):
        (record_path, weights), name = leavings[k], f"anneal_{k:02d}"
        folder, old = record_path.with_suffix(""), _record(record_path) if record_path.exists() else {}
        if old and weights.exists():
            flow = load_trained(flow, weights)
        else:
            known = weights.exists() and weights_digest(weights)
            system = work.system.cheap.at_temperature(cold)
            drawn, covered = ranks.after_first(fill_buffer)(
                lambda n, generator, flow=flow: flow.sample(n, generator),
                system.energy,
                folder,
                temperatures=(hot, cold),
                n_draws=section.n_draws,
                clip=section.clip,
                batch_size=section.draw_batch_size,
                generator_of=lambda i, name=name: work.generator(f"{name} draws", index=i),
            )
            settings = dict(section.fit) | {"lr": _stage_lr(section, k, len(temperatures))}
            if section.objective == "forward_kl":
                loss, n_evaluations = _on_buffer(work, drawn, name), 0
            else:
                loss, n_evaluations = _on_own_draws(section.objective, section, system), section.batch_size
            fitted = work.fit(name, flow, loss, **settings)
            record = asdict(covered) | fitted
            record["energy_evaluations"] += n_evaluations * fitted["steps"]
            record["weights"] = weights_digest(weights)
            if record["weights"] not in (known, old.get("weights")):
                ranks.by_first(work.folder.set_aside)(path for pair in leavings[k + 1 :] for path in pair)
            _write(record_path, record)
            del drawn, loss  # a mapped file cannot be deleted on Windows
        ranks.by_first(forget_buffer)(folder)
        records.append(_record(record_path))
    return {"steps": records, "energy_evaluations": sum(record["energy_evaluations"] for record in records)}


def load_models(folder: Path, config: DictConfig, system: System, device: torch.device) -> SplineModels:
    """The flows of the ladder."""
    flows = {"hot": config.hot.temperature} | {f"anneal_{k:02d}": cold for k, (_, cold) in enumerate(ladder(config))}
    return SplineModels(Path(folder), config, device, flows)


STAGES = {"hot": train_hot, "annealing": anneal, "evaluation": evaluate_ladder, "report": report_ladder}


# ---- objectives -----------------------------------------------------------------------------------------------------


def _on_own_draws(objective: str, section: DictConfig, system: System) -> Loss:
    """On the flow's own draws in each step: on draws made before, it would move to where none of them are."""
    if objective != "log_variance":
        system.require_gradient(f"objective={objective}")
    cut = system.typical_energy() + section.energy_cut

    def loss(flow: nn.Module, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        if objective == "reverse_kl":
            x, log_q = flow.sample_with_log_prob(section.batch_size, generator)
            return reverse_kl(log_q, system.energy(x), section.drop_highest, cut)
        if objective == "path_kl":
            x, log_q = flow.sample_with_path_log_prob(section.batch_size, generator)
            return path_kl(log_q, system.energy(x), section.deviation, section.covering, cut)
        x, log_q = flow.sample_with_fixed_log_prob(section.batch_size, generator)
        with torch.no_grad():
            u = soften(system.energy(x))
        return log_variance(log_q, u, section.deviation, section.covering)

    return loss


def _on_buffer(work: Workspace, drawn: WeightedSamples, name: str) -> Loss:
    """Forward KL on ``n_buffer`` of the draws, taken with replacement by their weights."""
    section, rng = work.config.annealing, work.numpy_generator(f"{name} resampling")
    data = torch.from_numpy(drawn.resample(section.n_buffer, rng).positions).to(work.device)

    def loss(flow: nn.Module, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        return forward_kl(flow.log_prob(minibatch(data, section.batch_size, generator)))

    return loss


def _stage_lr(section: DictConfig, k: int, n_stages: int) -> float:
    """From ``fit.lr`` in the first stage to ``last_lr`` in the last one, in steps of one ratio."""
    first = section.fit.lr
    return first * ((section.last_lr or first) / first) ** (k / max(1, n_stages - 1))


def ladder(config: DictConfig) -> list[tuple[float, float]]:
    """(drawn at, weighted to) of every step of the annealing."""
    section = config.annealing
    repeats = section.repeat_last, section.repeat_first, section.repeat_between
    return temperature_ladder(config.hot.temperature, section.temperature, section.n_steps, *repeats)


def _leavings(work: Workspace, n_stages: int) -> list[tuple[Path, Path]]:
    """The record and the weights of every step of the annealing."""
    home = work.folder.path
    paths = [(home / "annealing" / f"{k:02d}.json", weights_path(home, f"anneal_{k:02d}")) for k in range(n_stages)]
    return [(work.folder.leave(record), work.folder.leave(weights)) for record, weights in paths]


@ranks.by_first
def _write(path: Path, record: dict) -> None:
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(sealed(record), indent=1), encoding="utf-8")


def _record(path: Path) -> dict:
    record = read_json(path, AGAIN)
    if missing := {"steps", "energy_evaluations", *(field.name for field in fields(BufferRecord))} - set(record):
        raise damaged(path, f"it lacks {', '.join(sorted(missing))}", AGAIN)
    return record


def _trained(work: Workspace, name: str) -> SplineFlow:
    flow = make_spline_flow(work.config, work.system)
    return load_trained(flow, weights_path(work.folder.path, name)).to(work.device)
