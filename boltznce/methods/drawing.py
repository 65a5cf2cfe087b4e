"""Drawing from a trained flow: samples with mended chirality, energies and the likelihood that was asked for, in batches to disk."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from omegaconf import DictConfig
from torch import Tensor
from tqdm.auto import tqdm

from boltznce.analysis.reweighting import WeightedSamples, WeightedSamplesWriter
from boltznce.ebm import EnergyBasedModel
from boltznce.errors import UserError
from boltznce.flows.interpolant_flow import InterpolantFlow
from boltznce.io import require_free_space
from boltznce.methods.models import load_trained, make_ebm, make_flow, solver_settings
from boltznce.systems.base import System
from boltznce.systems.symmetry import mend_chirality

__all__ = ["LIKELIHOODS", "Batch", "Models", "draw", "draw_batches", "draw_to_folder", "load_models"]

LIKELIHOODS = ("ebm", "exact", "hutchinson", "none")
BARREN_BATCHES = 20  # so many on end without a sample to keep, and drawing gives up


@dataclass
class Models:
    """A trained flow and, where the run has come so far, its EBM."""

    config: DictConfig
    system: System
    flow: InterpolantFlow
    ebm: EnergyBasedModel | None = None

    @property
    def mirrors(self) -> bool:
        """Whether the flow makes mirror images of molecules as often as the molecules."""
        return self.system.dim == 3 and getattr(self.flow.network, "parity_equivariant", True)


def load_models(folder: Path, config: DictConfig, system: System, device: torch.device) -> Models:
    """The trained models in a run's folder; raises UserError if there is no flow yet."""
    flow_path, ebm_path = (Path(folder) / "checkpoints" / f"{name}.safetensors" for name in ("flow", "ebm"))
    if not flow_path.exists():
        raise UserError(f"The run in {folder} has no trained flow yet: finish it with scripts/train.py resume={folder}.")
    models = Models(config, system, load_trained(make_flow(config, system), flow_path).to(device))
    if ebm_path.exists():
        models.ebm = load_trained(make_ebm(config, system), ebm_path).to(device)
    return models


@dataclass(frozen=True)
class Batch:
    """The kept samples of one batch: positions (m, n, dim) in nm, reduced energy and log q (m,), float64; and what mending did."""

    positions: Tensor
    energy: Tensor
    log_prob: Tensor
    counts: dict[str, int]

    @property
    def log_weights(self) -> Tensor:
        """-u - log q, or zeros where no likelihood was asked for."""
        return torch.zeros_like(self.energy) if self.log_prob.isnan().all() else -self.energy - self.log_prob


@torch.no_grad()
def draw(models: Models, n: int, likelihood: str, generator: torch.Generator, n_probes: int = 1) -> Batch:
    """Draw ``n`` samples at once, mend their chirality, and give those kept energies and likelihoods.

    "exact" and "hutchinson" are integrated along the sampling path; folding mirror images together adds log 2 to them.
    """
    check_likelihood(models, likelihood)
    flow, system = models.flow, models.system
    on_path = likelihood if likelihood in ("exact", "hutchinson") else "none"
    solver = solver_settings(models.config.flow.solver)
    x, log_prob = flow.sample(n, generator, solver=solver, likelihood=on_path, n_probes=n_probes, batch_size=n)
    kept, n_mirrored = torch.ones(n, dtype=torch.bool, device=x.device), 0
    if system.dim == 3:
        mended = mend_chirality(x, system.chirality(x), models.mirrors)
        x, kept, n_mirrored = mended.positions, mended.kept, mended.n_mirrored
    energy = system.energy(x).double()
    if likelihood == "ebm":
        log_prob = models.ebm.log_prob(x)
    elif likelihood == "none":
        log_prob = torch.full_like(energy, torch.nan)
    else:
        log_prob = log_prob[kept] + (math.log(2) if models.mirrors else 0.0)
    return Batch(x, energy, log_prob, {"batches": 1, "drawn": n, "right_chirality": len(x), "mirrored": n_mirrored})


def check_likelihood(models: Models, likelihood: str) -> None:
    """Raise UserError for a likelihood that does not exist or that this run cannot give."""
    if likelihood not in LIKELIHOODS:
        raise UserError(f"Unknown likelihood '{likelihood}': choose one of {', '.join(LIKELIHOODS)}.")
    if likelihood == "ebm" and models.ebm is None:
        raise UserError(
            "likelihood=ebm needs a trained EBM, and this run has none: finish it with scripts/train.py resume=..., or choose exact."
        )


def draw_batches(
    models: Models,
    n: int,
    likelihood: str,
    generator_of: Callable[[int], torch.Generator],
    *,
    batch_size: int,
    n_probes: int = 1,
    n_done: int = 0,
    batches_done: int = 0,
) -> Iterator[Batch]:
    """Batches until ``n`` samples are kept, the last one cut; batch k takes its random numbers from ``generator_of(k)``.

    ``n_done`` and ``batches_done`` tell how far an earlier call came. Raises UserError if nothing that is drawn can be kept.
    """
    barren = 0
    while n_done < n:
        batch = draw(models, batch_size, likelihood, generator_of(batches_done), n_probes)
        room = n - n_done
        yield Batch(batch.positions[:room], batch.energy[:room], batch.log_prob[:room], batch.counts)
        n_done, batches_done = n_done + min(len(batch.energy), room), batches_done + 1
        barren = 0 if len(batch.energy) else barren + 1
        if barren == BARREN_BATCHES:
            raise UserError(f"None of {barren * batch_size} samples has the molecule's chirality: train the flow longer (flow.fit.steps).")


def draw_to_folder(
    models: Models,
    folder: Path,
    n: int,
    likelihood: str,
    generator_of: Callable[[int], torch.Generator],
    *,
    batch_size: int,
    n_probes: int = 1,
    meta: dict | None = None,
    format: str = "npy",
) -> WeightedSamples:
    """Draw until ``n`` samples are kept, and save them to ``folder``; a killed call goes on where it was, a finished one is loaded."""
    check_likelihood(models, likelihood)
    if not (folder / "meta.yaml").exists():
        n_bytes = n * (4 * models.system.n_atoms * models.system.dim * (1 if format == "npy" else 2) + 24)
        require_free_space(folder, n_bytes)
        settings = {"system": models.system.name, "likelihood": likelihood, "n": n, "batch_size": batch_size, "n_probes": n_probes}
        writer = WeightedSamplesWriter(folder, getattr(models.system, "topology", None), settings | (meta or {}))
        batches = draw_batches(
            models,
            n,
            likelihood,
            generator_of,
            batch_size=batch_size,
            n_probes=n_probes,
            n_done=writer.n_written,
            batches_done=writer.counts.get("batches", 0),
        )
        with tqdm(total=n, initial=writer.n_written, desc=f"samples, {likelihood}", unit="sample", mininterval=1.0) as bar:
            for batch in batches:
                arrays = (batch.positions, batch.energy, batch.log_prob, batch.log_weights)
                writer.append(*(a.cpu().numpy() for a in arrays), counts=batch.counts)
                bar.update(len(batch.energy))
        writer.finish(format)
    return WeightedSamples.load(folder)
