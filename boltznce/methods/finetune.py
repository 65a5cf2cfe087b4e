"""Fine-tuning of a run for many molecules to one peptide: of its EBM on the flow's draws for it, and of its flow on its simulation.

Stages: flow -> samples -> ebm -> evaluation -> report, in a folder of its own; what is trained starts from the parent run's weights.
"""

import json
import shutil
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf, open_dict
from torch import Tensor, nn

from boltznce.data.dataset import Dataset
from boltznce.data.simulate import simulate
from boltznce.errors import UserError
from boltznce.io import atomic_file
from boltznce.methods import transfer
from boltznce.methods.drawing import draw_to_folder
from boltznce.methods.frames import drawn_samples, minibatch
from boltznce.methods.report_parts import summary
from boltznce.methods.transfer import TransferModels, ebm_losses, load_shared, peptide_frames, shared_models
from boltznce.methods.transfer_report import evaluate_peptide, write_peptide_report
from boltznce.methods.workspace import Workspace
from boltznce.run_folder import RunFolder
from boltznce.systems.family import PeptideFamily
from boltznce.systems.molecular import MolecularSystem
from boltznce.systems.symmetry import rotate_methyls

__all__ = ["STAGES", "load_models", "start_finetuning", "summary"]


def start_finetuning(parent: Path | str, peptide: str, settings: DictConfig, folder: Path | str | None = None) -> RunFolder:
    """The folder of a fine-tuning, ``finetuned/<peptide>`` of the parent run unless told otherwise; to be handed to `boltznce.run.train`.

    Its config is the parent's with the sections of ``settings`` (see configs/finetune.yaml) in place of the parent's.

    Raises UserError for a parent that is no finished run for many molecules, and for a peptide that cannot be built.
    """
    run = RunFolder.open(Path(parent))
    config = run.config
    if config.method.name not in ("tbg", "boltznce_transfer"):
        raise UserError(f"{parent} is a run of method={config.method.name}: only runs for many molecules are fine-tuned to one.")
    transfer.load_models(run.path, config, peptide, torch.device("cpu"))
    has_ebm = (run.path / "checkpoints" / "ebm.safetensors").exists()
    if not has_ebm and not settings.finetune.flow_steps:
        raise UserError(f"{parent} has no EBM to fine-tune: set finetune.flow_steps, which trains its flow on a simulation.")
    with open_dict(config):
        config = OmegaConf.merge(config, settings)
        config.method.name = "finetune"
        config.finetune.parent, config.finetune.peptide = str(run.path.absolute()), peptide
        config.finetune.simulation = OmegaConf.merge(config.data.simulation, config.finetune.simulation)
    return RunFolder.create(Path(folder or run.path / "finetuned" / peptide), config, config.system.name)


def load_models(folder: Path, config: DictConfig, system: PeptideFamily | MolecularSystem | str, device: torch.device) -> TransferModels:
    """The models of the peptide that the run was fitted to, or of another: see `transfer.load_models`."""
    return transfer.load_models(folder, config, config.finetune.peptide if isinstance(system, PeptideFamily) else system, device)


def train_flow(work: Workspace) -> dict:
    """The parent's flow as it is, or trained on with frames of the peptide's simulation, which is made if need be."""
    section, steps = work.config.flow, work.config.finetune.flow_steps
    source = _parent(work) / "checkpoints" / "flow.safetensors"
    if not steps:
        target = work.folder.path / "checkpoints" / "flow.safetensors"
        with atomic_file(target) as temporary:
            shutil.copyfile(source, temporary)
        return {"steps": 0, "skipped_steps": 0, "validation_loss": None}
    member = _peptide(work)
    train, validation, _ = _simulation(work, member).split(**work.config.data.split)
    x_train, _ = peptide_frames(work, member, train, section.n_train)
    x_validation, _ = peptide_frames(work, member, validation, section.n_validation)
    shared = load_shared(work.config, work.system, "flow", source, work.device)

    def loss(shared: nn.Module, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        x = rotate_methyls(minibatch(x_train, section.batch_size, generator), member.methyl_groups, generator)
        return {"loss": shared(member, x, generator)}

    @torch.no_grad()
    def validate(shared: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
        return {"loss": torch.stack([shared(member, x, generator) for x in x_validation.split(section.batch_size)]).mean()}

    return work.fit("flow", shared, loss, validate, steps=steps, lr=work.config.finetune.lr)


def draw_samples(work: Workspace) -> dict:
    """Draws of the flow for the peptide, with likelihoods; none where the parent has no EBM."""
    if not _has_ebm(work):
        return {}
    section, models, counts = work.config.samples, shared_models(work).of(_peptide(work)), {}
    for name, n in (("train", section.n_train), ("validation", section.n_validation)):
        samples = draw_to_folder(
            models,
            work.folder.path / "samples" / name,
            n,
            section.likelihood,
            lambda k, name=name: work.generator(f"finetune {name}", k),
            batch_size=section.batch_size,
            n_probes=section.n_probes,
        )
        counts[name] = samples.meta["counts"]
    return counts


def train_ebm(work: Workspace) -> dict:
    """Train the parent's EBM on with the draws for the peptide."""
    if not _has_ebm(work):
        return {"steps": 0, "skipped_steps": 0, "validation_loss": None}
    member = _peptide(work)
    train, validation = ({member: drawn_samples(work.folder.path / "samples" / name, work.device)} for name in ("train", "validation"))
    shared = load_shared(work.config, work.system, "ebm", _parent(work) / "checkpoints" / "ebm.safetensors", work.device)
    loss, validate = ebm_losses(work.config.ebm, train, validation)
    return work.fit("ebm", shared, loss, validate, steps=work.config.finetune.ebm_steps, lr=work.config.finetune.lr)


def evaluate(work: Workspace) -> dict:
    """Weighted draws for the peptide."""
    models = shared_models(work).of(_peptide(work))
    return {"seconds_per_kept_sample": {models.system.name: evaluate_peptide(work, models)}}


def report(work: Workspace) -> dict:
    """The peptide's numbers before, where the parent has tested it, and after; figures of the latter."""
    member = _peptide(work)
    path, earlier = _parent(work) / "metrics.json", {}
    if path.exists():
        earlier = {f"{name}, before": row for name, row in json.loads(path.read_text())["peptides"].items() if name == member.name}
    write_peptide_report(work, member, _simulation(work, member), earlier)
    return {}


STAGES = {"flow": train_flow, "samples": draw_samples, "ebm": train_ebm, "evaluation": evaluate, "report": report}


def _parent(work: Workspace) -> Path:
    return Path(work.config.finetune.parent)


def _peptide(work: Workspace) -> MolecularSystem:
    return work.system.member(work.config.finetune.peptide)


def _has_ebm(work: Workspace) -> bool:
    return (_parent(work) / "checkpoints" / "ebm.safetensors").exists()


def _simulation(work: Workspace, member: MolecularSystem) -> Dataset:
    """The peptide's own data: those of the parent's family, or a folder beside them, simulated if it is not there."""
    folder = Path(work.config.data.folder) / member.name
    settings = OmegaConf.to_container(work.config.finetune.simulation, resolve=True)
    settings.pop("test", None)
    if not (folder / "meta.yaml").exists():
        simulate(member, folder, **(work.system.simulation | settings))
    return Dataset.load(folder)
