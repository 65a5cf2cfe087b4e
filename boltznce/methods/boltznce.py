"""BoltzNCE (arXiv 2507.00846): a flow trained on data, an EBM trained on the flow's draws, weights from the EBM's likelihood.

Stages: data -> flow -> samples -> ebm -> evaluation -> report. Each leaves its result in the run's folder, and a killed one goes on.
"""

from pathlib import Path

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from boltznce.checkpoint import save_weights
from boltznce.data.exact import draw_dataset
from boltznce.data.simulate import simulate
from boltznce.methods.drawing import draw_to_folder
from boltznce.methods.evaluation import evaluate, report
from boltznce.methods.frames import balanced_frames, drawn_samples, minibatch
from boltznce.methods.models import load_models, make_ebm, make_flow
from boltznce.methods.report_parts import summary
from boltznce.methods.workspace import Workspace
from boltznce.systems.symmetry import rotate_methyls

__all__ = ["STAGES", "load_models", "summary"]


def make_data(work: Workspace) -> dict:
    """Simulate the data, or draw them where there is nothing to simulate, if their folder has none; check that they are this system's."""
    section = work.config.data
    folder = Path(section.folder)
    if not (folder / "meta.yaml").exists():
        if section.simulation is None:
            draw_dataset(work.system, folder, section.n_samples, work.config.seed)
        else:
            simulate(work.system, folder, **OmegaConf.to_container(section.simulation, resolve=True))
    return {"frames": len(work.dataset)}


def train_flow(work: Workspace) -> dict:
    """Fit the flow to mode-balanced training frames (validation frames are balanced likewise), or take published weights."""
    section, system = work.config.flow, work.system
    if section.get("published_weights"):
        flow = make_flow(work.config, system)
        save_weights(work.folder.path / "checkpoints" / "flow.safetensors", flow.state_dict(), {"published": section.published_weights})
        return {"steps": 0, "skipped_steps": 0, "validation_loss": None}
    train, validation, _ = work.dataset.split(**work.config.data.split)
    balance = OmegaConf.to_container(section.balance, resolve=True) if section.balance else None
    rng = work.numpy_generator("balance")
    x_train, x_validation = (
        balanced_frames(system, part, n, balance, rng).to(work.device)
        for part, n in ((train, section.n_train), (validation, section.n_validation))
    )
    flow = make_flow(work.config, system).to(work.device)
    flow.calibrate(_symmetrized(work, x_train[:CALIBRATION], work.generator("flow calibration")), work.generator("flow noise"))

    def loss(flow: nn.Module, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        x = minibatch(x_train, section.batch_size, generator)
        return {"loss": flow.loss(_symmetrized(work, x, generator), generator)}

    @torch.no_grad()
    def validate(flow: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
        return {"loss": torch.stack([flow.loss(x, generator) for x in x_validation.split(section.batch_size)]).mean()}

    return work.fit("flow", flow, loss, validate)


def draw_training_samples(work: Workspace) -> dict:
    """Draw what the EBM is trained and validated on, with likelihoods by Hutchinson probes where it regresses onto them."""
    counts = {}
    for name, n in (("train", work.config.samples.n_train), ("validation", work.config.samples.n_validation)):
        samples = draw_to_folder(
            work.models,
            work.folder.path / "samples" / name,
            n,
            work.config.samples.likelihood,
            lambda k, name=name: work.generator(f"samples {name}", k),
            batch_size=work.config.samples.batch_size,
            n_probes=work.config.samples.n_probes,
        )
        counts[name] = samples.meta["counts"]
    return counts


def train_ebm(work: Workspace) -> dict:
    """Fit the EBM to the flow's draws: score matching and NCE, and regression of E(x, 0) onto their likelihoods if asked for."""
    section = work.config.ebm
    train, validation = (drawn_samples(work.folder.path / "samples" / name, work.device) for name in ("train", "validation"))
    ebm = make_ebm(work.config, work.system).to(work.device)
    ebm.calibrate(_symmetrized(work, train[0][:CALIBRATION], work.generator("ebm calibration")), work.generator("ebm noise"))
    if section.regression_weight:
        ebm.calibrate_constant(train[0][:CALIBRATION], train[1][:CALIBRATION])

    def parts(ebm: nn.Module, x: Tensor, log_q: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        losses = ebm.loss(x, generator)
        if section.regression_weight:
            losses["regression"] = ebm.regression_loss(x, log_q)
            losses["loss"] = losses["loss"] + section.regression_weight * losses["regression"]
        return losses

    def loss(ebm: nn.Module, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        index = torch.randint(len(train[0]), (section.batch_size,), generator=generator, device=work.device)
        return parts(ebm, _symmetrized(work, train[0][index], generator), train[1][index], generator)

    def validate(ebm: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
        batches = zip(validation[0].split(section.batch_size), validation[1].split(section.batch_size), strict=True)
        losses = [{key: value.detach() for key, value in parts(ebm, x, log_q, generator).items()} for x, log_q in batches]
        return {key: torch.stack([each[key] for each in losses]).mean() for key in losses[0]}

    record = work.fit("ebm", ebm, loss, validate)
    work.__dict__.pop("models", None)  # loaded before there was an EBM
    return record


STAGES = {
    "data": make_data,
    "flow": train_flow,
    "samples": draw_training_samples,
    "ebm": train_ebm,
    "evaluation": evaluate,
    "report": report,
}

CALIBRATION = 4096  # samples on which networks measure the scale of their inputs


def _symmetrized(work: Workspace, x: Tensor, generator: torch.Generator) -> Tensor:
    return rotate_methyls(x, getattr(work.system, "methyl_groups", ()), generator)
