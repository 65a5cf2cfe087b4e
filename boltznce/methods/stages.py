"""The stages that methods share, over the members of a system; a single system is its own only member."""

import logging
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from boltznce.analysis.reweighting import WeightedSamples
from boltznce.analysis.weights import normalized_weights
from boltznce.checkpoint import save_weights
from boltznce.data import members
from boltznce.data.batching import Batches
from boltznce.data.dataset import Dataset, boltzmann_indices, mode_balanced_indices
from boltznce.methods.drawing import draw_to_folder
from boltznce.methods.models import load_trained, make, weights_path
from boltznce.methods.preflight import needs_data
from boltznce.methods.workspace import Workspace
from boltznce.systems.base import System
from boltznce.systems.isomers import excluded_conformers, require_some_left
from boltznce.systems.symmetry import rotate_methyls
from boltznce.training import Loss

__all__ = ["draw_training_samples", "make_data", "minibatch", "train_ebm", "train_flow"]

log = logging.getLogger(__name__)
ISOMER_FRAMES = 20_000  # of a dataset, evenly spaced, that are looked at
CALIBRATION = 4096  # samples on which scales are measured

Losses = dict[str, Tensor]
Rows = Mapping[
    System, tuple[Tensor, ...]
]  # of each member: positions (n, atoms, dim) in nm, and what goes with them (n,)


def make_data(work: Workspace) -> dict:
    """Simulate the members that have no data yet, or draw them where they can be drawn exactly.

    Where nothing is trained on data, and no simulation of them is asked for, there need not be any.
    """
    section, simulation = work.config.data, work.config.data.simulation
    simulation = OmegaConf.to_container(simulation, resolve=True) if simulation else None
    if not needs_data(work.config, work.system) and not all(map(work.frames_exist, work.system.all_members())):
        return {"frames": 0, "datasets": {}, "simulation_seconds": 0.0}
    for member in work.system.all_members():
        place = Path(section.folder) / work.system.label(member)
        if not work.frames_exist(member):
            work.folder.check_writes(place)
        work.folder.leave(place)
    how = {key: section[key] for key in ("n_samples", "seed", "accept", "packed") if key in section}
    made = members.make_data(work.system, Path(section.folder), simulation=simulation, **how)
    for member in work.system.all_members():
        _check_isomers(member, made[member.name], section.folder)
    return {
        "frames": sum(map(len, made.values())),
        "datasets": {name: data.digest for name, data in made.items()},
        "simulation_seconds": sum(made[m.name].meta.get("cpu_seconds", 0.0) for m in work.system.members("train")),
    }


def _check_isomers(member: System, data: Dataset, folder: str) -> None:
    """Raise UserError, before anything is trained, where no frame of the data is of the structure's own isomer."""
    frames = data.take(slice(None, None, max(1, len(data) // ISOMER_FRAMES)))
    excluded = excluded_conformers(member, frames.positions)
    remedy = (
        f"give the structure that the data in {folder} were made of (system.structure), or set data.folder to others"
    )
    weights = normalized_weights(frames.log_weights)
    share = require_some_left(member, excluded, len(frames), "frames of the data", remedy, weights)
    if share < 0.5:
        log.warning("Only %.0f%% of the data of %s are of its structure's isomer.", 100 * share, member.name)


def train_flow(work: Workspace) -> dict:
    """Fit the flow to balanced frames of the members to train on; or take it as it begins, where it gets no steps.

    Validation losses are of held-out frames of these members and, as ``unseen``, of those to validate with.
    """
    section, system = work.config.flow, work.system
    if not section.fit.steps or section.published_weights:
        return _as_it_begins(work, "flow")
    parts = {member: work.frames(member).split(**work.config.data.split) for member in system.members("train")}
    numbers = {member: work.numpy_generator("balance", member) for member in parts}
    train, held_out = (
        {member: _balanced(work, member, part[k], n, numbers[member]) for member, part in parts.items()}
        for k, n in enumerate((section.n_train, section.n_validation))
    )
    unseen = {}
    for member in system.members("validation"):
        if member not in parts:
            frames, rng = (
                work.frames(member).split(**work.config.data.split)[0],
                work.numpy_generator("balance", member),
            )
            unseen[member] = _balanced(work, member, frames, section.n_validation, rng)
    unbalanced = [member.name for member, part in parts.items() if not _has_state(section, member, part[0])]
    if unbalanced:
        log.warning("The data of %s never are in the state: trained on as they are.", ", ".join(unbalanced))

    def losses_of(flow: nn.Module, x: Tensor, generator: torch.Generator) -> Losses:
        with torch.set_grad_enabled(flow.training):
            return {"loss": flow.loss(x, generator)}

    validation = {"seen": held_out} | ({"unseen": unseen} if unseen else {})
    return _fit(work, "flow", train, validation, losses_of) | {"not_balanced": unbalanced}


def draw_training_samples(work: Workspace) -> dict:
    """What the EBM is trained and validated on: draws of the members to train on, with likelihoods to regress onto."""
    section, counts = work.config.samples, {}
    if not work.config.ebm.fit.steps:
        return counts
    for name, n in (("train", section.n_train), ("validation", section.n_validation)):
        for member in work.system.members("train"):
            numbers = lambda k, name=name, member=member: work.generator(f"samples {name}", member, k)  # noqa: E731
            options = {"batch_size": section.batch_size, "n_probes": section.n_probes}
            folder, generator = work.folder.leave(work.samples(name, member)), work.models.of(member)
            samples = draw_to_folder(generator, folder, n, section.likelihood, numbers, **options)
            counts[f"{name} {member.name}"] = samples.meta["counts"]
    return counts


def train_ebm(work: Workspace) -> dict:
    """Fit the EBM to the flow's draws: score matching, NCE, and regression of E(x, 0) onto likelihoods if asked for."""
    section = work.config.ebm
    if not section.fit.steps:
        return _as_it_begins(work, "ebm")
    train, validation = (
        {member: _draws(work.samples(name, member), work.device) for member in work.system.members("train")}
        for name in ("train", "validation")
    )

    def losses_of(ebm: nn.Module, x: Tensor, log_q: Tensor, generator: torch.Generator) -> Losses:
        losses = ebm.loss(x, generator)
        if section.regression_weight:
            losses["regression"] = ebm.regression_loss(x, log_q)
            losses["loss"] = losses["loss"] + section.regression_weight * losses["regression"]
        return losses

    return _fit(work, "ebm", train, {"seen": validation}, losses_of)


def minibatch(x: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """``size`` rows of ``x``, drawn with replacement."""
    return x[torch.randint(len(x), (size,), generator=generator, device=x.device)]


# ---- training over members ------------------------------------------------------------------------------------------


def _fit(
    work: Workspace, name: str, train: Rows, validation: Mapping[str, Rows], losses_of: Callable[..., Losses]
) -> dict:
    """Train a model on rows of its members: in each step a few of them have an equal share of the batch each.

    ``losses_of`` takes the model of a member, its rows and random numbers. Of ``validation`` the first group counts.
    """
    section, model = work.config[name], _begun(work, name)
    for member, (x, *_) in train.items():
        first = _symmetrized(x[:CALIBRATION], member, work.generator(f"{name} calibration", member))
        model.calibrate(member, first, work.generator(f"{name} noise", member))

    def loss(model: nn.Module, step: int, generator: torch.Generator) -> Losses:
        each = []
        for member, size in _chosen(list(train), section, generator):
            x, *rest = train[member]
            index = torch.randint(len(x), (size,), generator=generator, device=x.device)
            x, *rest = x[index], *(part[index] for part in rest)
            each.append(losses_of(model.of(member), _symmetrized(x, member, generator), *rest, generator))
        return _mean(each)

    def validate(model: nn.Module, generator: torch.Generator) -> Losses:
        found = [_mean(list(_validated(model, rows, generator))) for rows in validation.values()]
        groups = {group: losses["loss"] for group, losses in zip(validation, found, strict=True)}
        return found[0] | (groups if len(groups) > 1 else {})

    def _validated(model: nn.Module, rows: Rows, generator: torch.Generator):
        for member, parts in rows.items():
            for part in zip(*(tensor.split(section.batch_size) for tensor in parts), strict=True):
                losses = losses_of(model.of(member), *part, generator)
                yield {key: value.detach() for key, value in losses.items()}

    return work.fit(name, model, _padded(work, name, train) if section.padded else loss, validate)


def _begun(work: Workspace, name: str) -> nn.Module:
    """An untrained model, or the one whose weights ``<name>.start`` names."""
    model, start = make(work.config, work.system, name), work.config[name].start
    return (load_trained(model, Path(start)) if start else model).to(work.device)


def _as_it_begins(work: Workspace, name: str) -> dict:
    section = work.config[name]
    metadata = {"start": section.start, "published": section.get("published_weights")}
    path = work.folder.leave(weights_path(work.folder.path, name))
    save_weights(path, _begun(work, name).state_dict(), metadata)
    return {"steps": 0, "skipped_steps": 0, "validation_loss": None}


def _chosen(among: Sequence[System], section: DictConfig, generator: torch.Generator) -> list[tuple[System, int]]:
    """``molecules_per_step`` members (null: all), each with its share of the batch.

    By the generator's seed: to ask the generator itself would wait for the device.
    """
    n = min(section.molecules_per_step or len(among), len(among))
    chosen = random.Random(generator.initial_seed()).sample(among, n)
    return [(member, max(2, section.batch_size // n)) for member in chosen]


def _padded(work: Workspace, name: str, train: Rows) -> Loss:
    """The loss on padded batches of unlike molecules."""
    section, any_member = work.config.flow, next(iter(train))
    batches = Batches(
        [x.cpu().numpy() for x, *_ in train.values()],
        [member.features for member in train],
        work.config[name].batch_size,
        work.config.seed,
        per_molecule=section.rows_per_molecule,
        max_padding=section.max_padding,
    )

    def loss(model: nn.Module, step: int, generator: torch.Generator) -> Losses:
        x, molecules = batches(step)
        losses = model.on(any_member, molecules.to(work.device)).loss(x.to(work.device), generator)
        return losses if isinstance(losses, dict) else {"loss": losses}

    return loss


def _mean(each: Sequence[Losses]) -> Losses:
    return {key: torch.stack([losses[key] for losses in each]).mean() for key in each[0]}


# ---- positions to train on ------------------------------------------------------------------------------------------


def _has_state(section: DictConfig, member: System, frames: Dataset) -> bool:
    """Whether states can be balanced, if they are to be: one that was never seen cannot be made frequent."""
    if not section.balance or member.state is None:
        return True
    return bool(member.in_state(frames.positions).any())


def _balanced(work: Workspace, member: System, frames: Dataset, n: int, rng: np.random.Generator) -> tuple[Tensor]:
    """``n`` frames in which the rare state is as frequent as ``flow.balance`` says (null: as it is)."""
    section = work.config.flow
    if not section.balance or member.state is None or not _has_state(section, member, frames):
        index = boltzmann_indices(frames.log_weights, n, rng)
    else:
        positions, is_angle = np.asarray(frames.positions), member.along_an_angle
        values = member.coordinate(positions, member.state.coordinate) if is_angle else member.in_state(positions)
        index = mode_balanced_indices(values, frames.log_weights, n, rng, member.state, **section.balance)
    return (torch.from_numpy(frames.positions[index]).to(work.device),)


def _draws(folder: Path, device: torch.device) -> tuple[Tensor, Tensor]:
    """Positions and log q (float32) of a folder of the flow's draws, without those that are not finite."""
    samples = WeightedSamples.load(folder)
    fine = np.isfinite(samples.energy) & (np.isfinite(samples.log_prob) | np.isnan(samples.log_prob).all())
    x, log_q = torch.from_numpy(samples.positions[fine]), torch.from_numpy(samples.log_prob[fine]).float()
    return x.to(device), log_q.to(device)


def _symmetrized(x: Tensor, member: System, generator: torch.Generator) -> Tensor:
    return rotate_methyls(x, member.methyl_groups, generator)
