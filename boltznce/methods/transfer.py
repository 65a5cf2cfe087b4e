"""What methods for many molecules share: one flow and one EBM for all peptides of a family, trained, loaded and drawn from.

Every peptide, of the training or never seen, is reached by its `MolecularSystem`: `SharedModel.of` makes its flow around the shared
network, and from there on it is handled like the flow of one molecule.
"""

import random
from pathlib import Path
from typing import ClassVar

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from boltznce.checkpoint import load_weights
from boltznce.config import build
from boltznce.data.batching import Batches
from boltznce.data.dataset import Dataset
from boltznce.data.many import is_complete, load_many, simulate_many
from boltznce.ebm import EnergyBasedModel
from boltznce.errors import UserError
from boltznce.flows.interpolant_flow import InterpolantFlow
from boltznce.methods.drawing import draw_to_folder
from boltznce.methods.frames import balanced_frames, drawn_samples, minibatch
from boltznce.methods.models import FlowModels
from boltznce.methods.sharing import SharedModel
from boltznce.methods.workspace import Workspace
from boltznce.networks.build import build_network
from boltznce.networks.compile import compile_forward
from boltznce.systems.bond_graph import BondGraph
from boltznce.systems.family import PeptideFamily
from boltznce.systems.molecular import MolecularSystem
from boltznce.systems.symmetry import mend_chirality, rotate_methyls

__all__ = [
    "SharedModels",
    "TransferModels",
    "draw_training_samples",
    "ebm_losses",
    "load_models",
    "load_shared",
    "make_data",
    "make_shared",
    "peptide_frames",
    "shared_models",
    "train_ebm",
    "train_flow",
]


# ---- models -----------------------------------------------------------------------------------------------------------


def make_shared(config: DictConfig, family: PeptideFamily, name: str) -> SharedModel:
    """The untrained shared ``flow`` or ``ebm``; its first weights follow from the config's seed.

    Raises UserError for settings of a model of many molecules that contradict each other.
    """
    section = config[name]
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        network = build_network(OmegaConf.to_container(section.network, resolve=True), n_features=family.n_features, dim=family.dim)
    settings = OmegaConf.to_container(section.model, resolve=True)
    if hasattr(network, "bind") and family.encoding != "numbered":
        raise UserError(f"{type(network).__name__} wants all atoms of a molecule told apart: set system.encoding=numbered.")
    if section.get("padded"):
        if hasattr(network, "bind") or settings.get("whiten"):
            raise UserError(
                f"Padded batches need a network with masks and an isotropic prior: set {name}.padded=false, or another network."
            )
        compile_forward(network, config.compile)
    return SharedModel(network, InterpolantFlow if name == "flow" else EnergyBasedModel, settings)


def load_shared(config: DictConfig, family: PeptideFamily, name: str, path: Path, device: torch.device) -> SharedModel:
    """A trained one, from its weights."""
    shared = make_shared(config, family, name)
    shared.load_state_dict(load_weights(path)[0])
    return shared.to(device).eval()


class TransferModels(FlowModels):
    """The flow and the EBM of one peptide, seen in training or not; samples are held against the peptide's bond graph.

    Raises UserError from ``draw`` for a family: it has to be told which of its peptides.
    """

    likelihoods: ClassVar = ("ebm", "exact", "hutchinson", "none")

    @property
    def default_likelihood(self) -> str:
        return "exact" if self.ebm is None else "ebm"

    def mend(self, x: Tensor) -> tuple[Tensor, Tensor, dict[str, int]]:
        """Those with the right bonds, atoms put in the topology's order, and the right chirality, mirrored where that mends it.

        Reordering exchanges atoms that the network takes for equal, so it changes no density; with the encoding ``numbered`` none are, and
        conformers that need it are dropped.
        """
        checked = BondGraph.of(self.system.topology).check(x)
        right = checked.right if self._exchangeable else checked.right & ~checked.reordered
        right = right.to(x.device)
        ordered = checked.apply(x)[right]
        mended = mend_chirality(ordered, self.system.chirality(ordered), self.mirrors)
        kept = torch.zeros_like(right)
        kept[right] = mended.kept
        counts = {
            "right_graph": int(right.sum()),
            "reordered": int((checked.reordered.to(x.device) & right).sum()),
            "right_chirality": len(mended.positions),
            "mirrored": mended.n_mirrored,
        }
        return mended.positions, kept, counts

    @property
    def _exchangeable(self) -> bool:
        return self.config.system.encoding != "numbered"


class SharedModels:
    """The trained models of a run: ``of(molecule)`` are those of one peptide. Made once, as peptides are asked for."""

    def __init__(self, config: DictConfig, flow: SharedModel, ebm: SharedModel | None) -> None:
        self.config, self.flow, self.ebm = config, flow, ebm

    @classmethod
    def load(cls, folder: Path, config: DictConfig, family: PeptideFamily, device: torch.device) -> "SharedModels":
        """From a run's folder; raises UserError if there is no flow yet."""
        paths = {name: Path(folder) / "checkpoints" / f"{name}.safetensors" for name in ("flow", "ebm")}
        if not paths["flow"].exists():
            raise UserError(f"The run in {folder} has no trained flow yet: finish it with scripts/train.py resume={folder}.")
        flow, ebm = (load_shared(config, family, name, path, device) if path.exists() else None for name, path in paths.items())
        return cls(config, flow, ebm)

    def of(self, molecule: MolecularSystem) -> TransferModels:
        """What is drawn from for one peptide."""
        return TransferModels(self.config, molecule, self.flow.of(molecule), self.ebm and self.ebm.of(molecule))


def load_models(folder: Path, config: DictConfig, system: PeptideFamily | MolecularSystem | str, device: torch.device) -> TransferModels:
    """The models of one peptide, ``system``, by its sequence or as `load_system` makes it; the run's family need not list it.

    Raises UserError if there is no flow yet, for a system that is no member of the family, and for the family itself, which is more than
    one can draw from.
    """
    of_many = isinstance(system, PeptideFamily)
    family = system if of_many else build(config.system)
    member = family.choose(None if of_many else system)
    return SharedModels.load(folder, config, family, device).of(member)


def shared_models(work: Workspace) -> SharedModels:
    """Those of the run as far as it has come."""
    return SharedModels.load(work.folder.path, work.config, work.system, work.device)


# ---- stages -----------------------------------------------------------------------------------------------------------


def make_data(work: Workspace) -> dict:
    """Simulate every peptide of the family that has no data yet."""
    folder = Path(work.config.data.folder)
    if not is_complete(work.system, folder):
        simulate_many(work.system, folder, **OmegaConf.to_container(work.config.data.simulation, resolve=True))
    return {"frames": {sequence: len(dataset) for sequence, dataset in load_many(work.system, folder).items()}}


def train_flow(work: Workspace) -> dict:
    """Fit the flow to mode-balanced frames of the training peptides.

    Each step takes ``molecules_per_step`` of them, drawn at random, with an equal share of the batch each; or, with ``padded``, a batch of
    unlike molecules. Validation losses are of held-out frames of the training peptides and, as ``unseen``, of the validation peptides.
    """
    section, family = work.config.flow, work.system
    datasets = load_many(family, Path(work.config.data.folder), ("train", "validation"))
    train, held_out, unseen, unbalanced = {}, {}, {}, []
    for sequence, dataset in datasets.items():
        member = family.member(sequence)
        parts = dataset.split(**work.config.data.split)
        if sequence in family.sequences["train"]:
            train[sequence], fine = peptide_frames(work, member, parts[0], section.n_train)
            held_out[sequence], _ = peptide_frames(work, member, parts[1], section.n_validation)
            if not fine:
                unbalanced.append(sequence)
        else:
            unseen[sequence], _ = peptide_frames(work, member, parts[0], section.n_validation)
    shared = make_shared(work.config, family, "flow").to(work.device)
    members = [family.member(sequence) for sequence in train]

    def loss(shared: nn.Module, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        chosen = _choose(members, section.molecules_per_step, generator)
        size = max(1, section.batch_size // len(chosen))
        losses = []
        for member in chosen:
            x = rotate_methyls(minibatch(train[member.name], size, generator), member.methyl_groups, generator)
            losses.append(shared(member, x, generator))
        return {"loss": torch.stack(losses).mean()}

    if section.padded:
        batches = _padded_batches(work, {member: train[member.name] for member in members}, section.batch_size)

        def loss(shared: nn.Module, step: int, generator: torch.Generator) -> dict[str, Tensor]:
            x, molecules = batches(step)
            return {"loss": shared.of(members[0]).loss(x.to(work.device), generator, molecules.to(work.device))}

    @torch.no_grad()
    def validate(shared: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
        def mean(frames: dict[str, Tensor]) -> Tensor:
            each = [shared(family.member(s), part, generator) for s, x in frames.items() for part in x.split(section.batch_size)]
            return torch.stack(each).mean()

        seen = mean(held_out)
        return {"loss": seen, "seen": seen, **({"unseen": mean(unseen)} if unseen else {})}

    return work.fit("flow", shared, loss, validate) | {"not_balanced": unbalanced}


def draw_training_samples(work: Workspace) -> dict:
    """Draws for every training peptide, which the EBM is trained and validated on, with likelihoods where it regresses onto them."""
    section, counts, models = work.config.samples, {}, shared_models(work)
    for name, n in (("train", section.n_train), ("validation", section.n_validation)):
        for member in work.system.members("train"):
            samples = draw_to_folder(
                models.of(member),
                work.folder.path / "samples" / name / member.name,
                n,
                section.likelihood,
                lambda k, stream=f"samples {name} {member.name}": work.generator(stream, k),
                batch_size=section.batch_size,
                n_probes=section.n_probes,
            )
            counts[f"{name} {member.name}"] = samples.meta["counts"]
    return counts


def train_ebm(work: Workspace) -> dict:
    """Fit the EBM to the flow's draws for the training peptides, a few peptides a step."""
    section, family = work.config.ebm, work.system
    train, validation = (
        {member: drawn_samples(work.folder.path / "samples" / name / member.name, work.device) for member in family.members("train")}
        for name in ("train", "validation")
    )
    shared = make_shared(work.config, family, "ebm").to(work.device)
    loss, validate = ebm_losses(section, train, validation)
    if section.padded:
        if section.regression_weight:
            raise UserError("The regression needs batches of one molecule: set ebm.padded=false or ebm.regression_weight=0.")
        batches, any_member = _padded_batches(work, {member: x for member, (x, _) in train.items()}, section.batch_size), next(iter(train))

        def loss(shared: nn.Module, step: int, generator: torch.Generator) -> dict[str, Tensor]:
            x, molecules = batches(step)
            return shared.of(any_member).loss(x.to(work.device), generator, molecules.to(work.device))

    return work.fit("ebm", shared, loss, validate)


def ebm_losses(section: DictConfig, train: dict, validation: dict) -> tuple:
    """Loss and validation of a shared EBM on samples, system -> (positions, log q)."""
    members = list(train)

    def parts(shared: SharedModel, member: MolecularSystem, x: Tensor, log_q: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        ebm = shared.of(member)
        losses = ebm.loss(x, generator)
        if section.regression_weight:
            losses["regression"] = ebm.regression_loss(x, log_q, free_constant=True)
            losses["loss"] = losses["loss"] + section.regression_weight * losses["regression"]
        return losses

    def mean(each: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        return {key: torch.stack([losses[key] for losses in each]).mean() for key in each[0]}

    def loss(shared: nn.Module, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        chosen, each = _choose(members, section.molecules_per_step, generator), []
        for member in chosen:
            x, log_q = train[member]
            index = torch.randint(len(x), (max(2, section.batch_size // len(chosen)),), generator=generator, device=x.device)
            each.append(parts(shared, member, rotate_methyls(x[index], member.methyl_groups, generator), log_q[index], generator))
        return mean(each)

    def validate(shared: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
        each = [
            {key: value.detach() for key, value in parts(shared, member, x_part, log_q_part, generator).items()}
            for member, (x, log_q) in validation.items()
            for x_part, log_q_part in zip(x.split(section.batch_size), log_q.split(section.batch_size), strict=True)
        ]
        return mean(each)

    return loss, validate


def peptide_frames(work: Workspace, member: MolecularSystem, frames: Dataset, n: int) -> tuple[Tensor, bool]:
    """``n`` frames balanced between states, and whether they are: a state that was never seen cannot be made frequent."""
    balance = OmegaConf.to_container(work.config.flow.balance, resolve=True) if work.config.flow.balance else None
    rng = work.numpy_generator(f"balance {member.name} {len(frames)}")
    phi = member.coordinate(frames.positions, member.state[0]) if balance else None
    low, high = member.state[1] if member.state else (0.0, 0.0)
    seen = balance is None or bool(((phi > low) & (phi < high)).any())
    return balanced_frames(member, frames, n, balance if seen else None, rng).to(work.device), seen


def _padded_batches(work: Workspace, positions: dict[MolecularSystem, Tensor], batch_size: int) -> Batches:
    """Batches of unlike molecules, positions as the data of each."""
    section = work.config.flow
    return Batches(
        [x.cpu().numpy() for x in positions.values()],
        [member.features for member in positions],
        batch_size,
        work.config.seed,
        per_molecule=section.rows_per_molecule,
        max_padding=section.max_padding,
    )


def _choose(members: list, n: int | None, generator: torch.Generator) -> list:
    """``n`` of the members, or all, by the generator's seed: to ask the generator itself would wait for the device."""
    return random.Random(generator.initial_seed()).sample(members, min(n or len(members), len(members)))
