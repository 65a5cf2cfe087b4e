"""The stages that methods share, over the members of a system: data, flow, its draws, EBM.

A single system is its own only member, with every role. Each stage leaves its result in the run's folder, and a killed
one goes on.
"""

import logging
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from boltznce.analysis.reweighting import WeightedSamples
from boltznce.checkpoint import save_weights
from boltznce.data import members
from boltznce.data.batching import Batches
from boltznce.data.dataset import Dataset, boltzmann_indices, mode_balanced_indices
from boltznce.errors import UserError
from boltznce.methods.drawing import draw_to_folder
from boltznce.methods.models import Model, OneMolecule, load_trained, make, weights_path
from boltznce.methods.workspace import Workspace
from boltznce.systems.base import System
from boltznce.systems.symmetry import rotate_methyls
from boltznce.training import Loss

__all__ = ["draw_training_samples", "make_data", "minibatch", "train_ebm", "train_flow"]

log = logging.getLogger(__name__)
CALIBRATION = 4096  # samples on which scales are measured


def make_data(work: Workspace) -> dict:
    """Simulate the members that have no data yet, or draw them where they can be drawn exactly."""
    section = work.config.data
    made = members.make_data(
        work.system,
        Path(section.folder),
        simulation=OmegaConf.to_container(section.simulation, resolve=True) if section.simulation else None,
        n_samples=section.get("n_samples"),
        seed=work.config.seed,
    )
    return {"frames": sum(map(len, made.values()))}


def train_flow(work: Workspace) -> dict:
    """Fit the flow to balanced frames of the members to train on; or take it as it begins, where it gets no steps.

    Validation losses are of held-out frames of these members and, as ``unseen``, of those to validate with.
    """
    section, model = work.config.flow, _begun(work, "flow")
    if not section.fit.steps or section.published_weights:
        return _as_it_begins(work, "flow", model)
    train, held_out, unseen, unbalanced = _frames_to_train_on(work)
    for member, x in train.items():
        frames = _symmetrized(x[:CALIBRATION], member, work.generator("flow calibration", member))
        model.calibrate(member, frames, work.generator("flow noise", member))

    def loss_of(model: nn.Module, member: System, x: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        return {"loss": model.of(member).loss(x, generator)}

    def loss(model: nn.Module, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        each = []
        for member, size in _chosen(list(train), section, generator):
            x = _symmetrized(minibatch(train[member], size, generator), member, generator)
            each.append(loss_of(model, member, x, generator))
        return _mean(each)

    @torch.no_grad()
    def validate(model: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
        def mean(frames: dict[System, Tensor]) -> Tensor:
            parts = [(m, part) for m, x in frames.items() for part in x.split(section.batch_size)]
            return _mean([loss_of(model, member, part, generator) for member, part in parts])["loss"]

        seen = mean(held_out)
        return {"loss": seen} | ({"seen": seen, "unseen": mean(unseen)} if unseen else {})

    record = work.fit("flow", model, _padded(work, "flow", train) if section.padded else loss, validate)
    return record | {"not_balanced": unbalanced}


def draw_training_samples(work: Workspace) -> dict:
    """What the EBM is trained and validated on.

    Draws of every member to train on, with likelihoods where it regresses onto them.
    """
    section, counts = work.config.samples, {}
    for name, n in (("train", section.n_train), ("validation", section.n_validation)):
        for member in work.system.members("train"):
            samples = draw_to_folder(
                work.models.of(member),
                work.samples(name, member),
                n,
                section.likelihood,
                lambda k, name=name, member=member: work.generator(f"samples {name}", member, k),
                batch_size=section.batch_size,
                n_probes=section.n_probes,
            )
            counts[f"{name} {member.name}"] = samples.meta["counts"]
    return counts


def train_ebm(work: Workspace) -> dict:
    """Fit the EBM to the flow's draws.

    Score matching and NCE, and regression of E(x, 0) onto their likelihoods if asked for.
    """
    section, model = work.config.ebm, _begun(work, "ebm")
    if section.padded and section.regression_weight:
        raise UserError(
            "The regression needs batches of one molecule: set ebm.padded=false or ebm.regression_weight=0."
        )
    if not section.fit.steps:
        return _as_it_begins(work, "ebm", model)
    train, validation = (
        {member: _draws(work.samples(name, member), work.device) for member in work.system.members("train")}
        for name in ("train", "validation")
    )
    for member, (x, _) in train.items():
        draws = _symmetrized(x[:CALIBRATION], member, work.generator("ebm calibration", member))
        model.calibrate(member, draws, work.generator("ebm noise", member))

    def loss_of(
        model: nn.Module, member: System, x: Tensor, log_q: Tensor, generator: torch.Generator
    ) -> dict[str, Tensor]:
        ebm = model.of(member)
        losses = ebm.loss(x, generator)
        if section.regression_weight:
            losses["regression"] = ebm.regression_loss(x, log_q)
            losses["loss"] = losses["loss"] + section.regression_weight * losses["regression"]
        return losses

    def loss(model: nn.Module, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        each = []
        for member, size in _chosen(list(train), section, generator):
            x, log_q = train[member]
            index = _places(len(x), max(2, size), generator, x.device)
            each.append(loss_of(model, member, _symmetrized(x[index], member, generator), log_q[index], generator))
        return _mean(each)

    def validate(model: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
        each = []
        for member, (x, log_q) in validation.items():
            for x_part, log_q_part in zip(x.split(section.batch_size), log_q.split(section.batch_size), strict=True):
                losses = loss_of(model, member, x_part, log_q_part, generator)
                each.append({key: value.detach() for key, value in losses.items()})
        return _mean(each)

    positions = {member: x for member, (x, _) in train.items()}
    return work.fit("ebm", model, _padded(work, "ebm", positions) if section.padded else loss, validate)


def minibatch(x: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """``size`` rows of ``x``, drawn with replacement."""
    return x[_places(len(x), size, generator, x.device)]


# ---- how a model begins ---------------------------------------------------------------------------------------------


def _begun(work: Workspace, name: str) -> Model | OneMolecule:
    """An untrained model, or the one whose weights ``<name>.start`` names."""
    model, start = make(work.config, work.system, name), work.config[name].start
    return (load_trained(model, Path(start)) if start else model).to(work.device)


def _as_it_begins(work: Workspace, name: str, model: nn.Module) -> dict:
    section = work.config[name]
    metadata = {"start": section.start, "published": section.get("published_weights")}
    save_weights(weights_path(work.folder.path, name), model.state_dict(), metadata)
    return {"steps": 0, "skipped_steps": 0, "validation_loss": None}


# ---- positions to train on ------------------------------------------------------------------------------------------


def _frames_to_train_on(work: Workspace) -> tuple[dict, dict, dict, list[str]]:
    """Balanced frames of each member: to train on, held out, of members to validate with.

    And whose state was never seen.
    """
    section, system = work.config.flow, work.system
    train, held_out, unseen, unbalanced = {}, {}, {}, []
    for member in system.members("train"):
        first, second, _ = work.frames(member).split(**work.config.data.split)
        rng = work.numpy_generator("balance", member)
        if not _has_state(section, member, first):
            unbalanced.append(member.name)
        train[member] = _balanced(section, member, first, section.n_train, rng).to(work.device)
        held_out[member] = _balanced(section, member, second, section.n_validation, rng).to(work.device)
    for member in system.members("validation"):
        if member not in train:
            frames, rng = (
                work.frames(member).split(**work.config.data.split)[0],
                work.numpy_generator("balance", member),
            )
            unseen[member] = _balanced(section, member, frames, section.n_validation, rng).to(work.device)
    if unbalanced:
        log.warning("The data of %s never are in the state: trained on as they are.", ", ".join(unbalanced))
    return train, held_out, unseen, unbalanced


def _has_state(section: DictConfig, member: System, frames: Dataset) -> bool:
    """Whether states can be balanced: one that was never seen cannot be made frequent."""
    if not section.balance or member.state is None:
        return True
    return bool(member.state.contains(member.coordinate(frames.positions, member.state.coordinate)).any())


def _balanced(section: DictConfig, member: System, frames: Dataset, n: int, rng: np.random.Generator) -> Tensor:
    """``n`` frames (n, atoms, dim) in which the rare state is as frequent as ``section.balance`` says (null.

    As it is).
    """
    if not section.balance or member.state is None or not _has_state(section, member, frames):
        index = boltzmann_indices(frames.log_weights, n, rng)
    else:
        values = member.coordinate(np.asarray(frames.positions), member.state.coordinate)
        index = mode_balanced_indices(values, frames.log_weights, n, rng, member.state, **section.balance)
    return torch.from_numpy(frames.positions[index])


def _draws(folder: Path, device: torch.device) -> tuple[Tensor, Tensor]:
    """Positions and log q (float32) of a folder of the flow's draws, without those that are not finite."""
    samples = WeightedSamples.load(folder)
    fine = np.isfinite(samples.energy) & (np.isfinite(samples.log_prob) | np.isnan(samples.log_prob).all())
    x, log_q = torch.from_numpy(samples.positions[fine]), torch.from_numpy(samples.log_prob[fine]).float()
    return x.to(device), log_q.to(device)


# ---- losses over members --------------------------------------------------------------------------------------------


def _chosen(all_members: Sequence[System], section: DictConfig, generator: torch.Generator) -> list[tuple[System, int]]:
    """``molecules_per_step`` members (null: all), each with its share of the batch.

    By the generator's seed: to ask the generator itself would wait for the device.
    """
    n = min(section.molecules_per_step or len(all_members), len(all_members))
    chosen = random.Random(generator.initial_seed()).sample(all_members, n)
    return [(member, max(1, section.batch_size // n)) for member in chosen]


def _padded(work: Workspace, name: str, positions: dict[System, Tensor]) -> Loss:
    """The loss on padded batches of unlike molecules, positions as the data of each."""
    section, any_member = work.config.flow, next(iter(positions))
    batches = Batches(
        [x.cpu().numpy() for x in positions.values()],
        [member.features for member in positions],
        work.config[name].batch_size,
        work.config.seed,
        per_molecule=section.rows_per_molecule,
        max_padding=section.max_padding,
    )

    def loss(model: nn.Module, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        x, molecules = batches(step)
        losses = model.on(any_member, molecules.to(work.device)).loss(x.to(work.device), generator)
        return losses if isinstance(losses, dict) else {"loss": losses}

    return loss


def _mean(each: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {key: torch.stack([losses[key] for losses in each]).mean() for key in each[0]}


def _places(n: int, size: int, generator: torch.Generator, device: torch.device) -> Tensor:
    return torch.randint(n, (size,), generator=generator, device=device)


def _symmetrized(x: Tensor, member: System, generator: torch.Generator) -> Tensor:
    return rotate_methyls(x, member.methyl_groups, generator)
