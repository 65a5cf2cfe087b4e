"""Drawing from trained models of any method: samples with energies and a likelihood, in batches to disk."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from tqdm.auto import tqdm

from boltznce import ranks
from boltznce.analysis.reweighting import WeightedSamples, WeightedSamplesWriter
from boltznce.checkpoint import parameters_digest
from boltznce.errors import UserError
from boltznce.io import require_free_space
from boltznce.systems.base import System

__all__ = ["LIKELIHOODS", "Batch", "Generator", "choose_likelihood", "draw_batches", "draw_to_folder"]

LIKELIHOODS = ("ebm", "exact", "hutchinson", "none")
BARREN_BATCHES = 20  # so many on end without a sample to keep, and drawing gives up


@dataclass(frozen=True)
class Batch:
    """The kept samples of one batch: positions (m, n, dim) in nm, reduced energy and log q (m,), float64.

    Counts to be summed up.
    """

    positions: Tensor
    energy: Tensor
    log_prob: Tensor
    counts: dict[str, int]

    def cpu(self) -> "Batch":
        """The same on the CPU."""
        arrays = {"positions": self.positions, "energy": self.energy, "log_prob": self.log_prob}
        return replace(self, **{name: array.cpu() for name, array in arrays.items()})


class Generator:
    """What is drawn from: the trained models of one system.

    Attributes:
        config: of the run.
        system: whose energy, or that of its proxy, weighs the samples.
        likelihoods: those of `LIKELIHOODS` that it has.
        default_likelihood: the one that ``likelihood=auto`` stands for.
        notes: sentences for a report on how its samples are made.
        base_log_prob: log-density of its draws up to a constant, positions (n, atoms, dim) -> (n,), where its gradient
            is cheap: what refinement begins with.
        device: where it computes.
    """

    config: DictConfig
    system: System
    likelihoods: Sequence[str] = ("exact", "none")
    default_likelihood: str = "exact"
    notes: tuple[str, ...] = ()
    base_log_prob: Callable[[Tensor], Tensor] | None = None
    device: torch.device

    def check(self, likelihood: str) -> None:
        """Raise UserError where one of ``likelihoods`` cannot be had from this run yet."""

    def models(self, likelihood: str) -> Sequence[nn.Module]:
        """What is trained of it, as far as draws with this likelihood depend on it; saved ones are tied to these."""
        return ()

    def batch_size(self, likelihood: str) -> int:
        """How many to draw at once, unless told otherwise."""
        return self.config.evaluation.batch_size

    def draw(self, n: int, likelihood: str, generator: torch.Generator, n_probes: int = 1) -> Batch:
        """Draw ``n`` samples at once, and keep some or all; log q is NaN with "none"."""
        raise NotImplementedError

    def log_prob(self, positions: Tensor) -> Tensor:
        """Exact log q (n,), float64, of given positions (n, atoms, dim) in nm, normalized as that of the draws is."""
        raise NotImplementedError


def choose_likelihood(models: Generator, likelihood: str) -> str:
    """``likelihood``, or the generator's own for "auto".

    Raises UserError for one that does not exist or that this run cannot give.
    """
    if likelihood == "auto":
        likelihood = models.default_likelihood
    if likelihood not in LIKELIHOODS:
        raise UserError(f"Unknown likelihood '{likelihood}': choose auto or one of {', '.join(LIKELIHOODS)}.")
    if likelihood not in models.likelihoods:
        known = ", ".join(models.likelihoods)
        raise UserError(f"The generator of this run has no likelihood={likelihood}: choose one of {known}.")
    models.check(likelihood)
    return likelihood


def draw_batches(
    models: Generator,
    n: int,
    likelihood: str,
    generator_of: Callable[[int], torch.Generator],
    *,
    batch_size: int,
    n_probes: int = 1,
    n_done: int = 0,
    batches_done: int = 0,
) -> Iterator[Batch]:
    """Batches until ``n`` samples are kept, the last one cut; batch k takes its numbers from ``generator_of(k)``.

    On the CPU; of processes that share a run each computes some, and all get all of them. ``n_done`` and
    ``batches_done`` tell how far an earlier call came. Raises UserError if nothing that is drawn can be kept.
    """

    def draw(k: int) -> Batch:
        return models.draw(batch_size, likelihood, generator_of(k), n_probes).cpu()

    barren, drawn = 0, ranks.in_turn(draw, batches_done)
    while n_done < n:
        batch, room = next(drawn), n - n_done
        yield Batch(batch.positions[:room], batch.energy[:room], batch.log_prob[:room], batch.counts)
        n_done += min(len(batch.energy), room)
        barren = 0 if len(batch.energy) else barren + 1
        if barren == BARREN_BATCHES:
            raise UserError(
                f"None of {barren * batch_size} samples of {models.system.name} has its bonds and chirality: "
                "train the flow longer (flow.fit.steps), or on more molecules."
            )


def _writer(models: Generator, folder: Path, n: int, settings: dict, format: str) -> WeightedSamplesWriter:
    require_free_space(folder, n * (4 * models.system.n_atoms * models.system.dim * (1 if format == "npy" else 2) + 24))
    return WeightedSamplesWriter(folder, models.system.topology, settings)


def draw_to_folder(
    models: Generator,
    folder: Path,
    n: int,
    likelihood: str,
    generator_of: Callable[[int], torch.Generator],
    *,
    batch_size: int | None = None,
    n_probes: int = 1,
    meta: dict | None = None,
    format: str = "npy",
) -> WeightedSamples:
    """Draw until ``n`` samples are kept, and save them to ``folder``.

    A killed call goes on where it was, a finished one is loaded; UserError for a folder of other samples, or of those
    of other weights.
    """
    likelihood = choose_likelihood(models, likelihood)
    batch_size = batch_size or models.batch_size(likelihood)
    settings = {"system": models.system.name, "likelihood": likelihood, "n": n}
    settings |= {"batch_size": batch_size, "n_probes": n_probes} | (meta or {})
    settings["weights"] = parameters_digest(models.models(likelihood))
    if not ranks.by_first((folder / "meta.yaml").exists)():
        writer = _writer(models, folder, n, settings, format) if ranks.is_first() else None
        n_done, batches_done = ranks.by_first(lambda: (writer.n_written, writer.counts.get("batches", 0)))()
        how = {"batch_size": batch_size, "n_probes": n_probes, "n_done": n_done, "batches_done": batches_done}
        shown = {"desc": f"samples of {models.system.name}, {likelihood}", "unit": "sample", "mininterval": 1.0}
        with tqdm(total=n, initial=n_done, disable=writer is None, **shown) as bar:
            for batch in draw_batches(models, n, likelihood, generator_of, **how):
                if writer:
                    arrays = (batch.positions, batch.energy, batch.log_prob)
                    writer.append(*(a.numpy() for a in arrays), counts=batch.counts)
                bar.update(len(batch.energy))
        ranks.by_first(lambda: writer.finish(format))()
    samples = WeightedSamples.load(folder)
    others = [f"{key}={samples.meta.get(key)}" for key, value in settings.items() if samples.meta.get(key) != value]
    if others or not (format == "npy" or (folder / f"trajectory.{format}").exists()):
        found = ", ".join(others) or f"no trajectory.{format}"
        raise UserError(f"{folder} holds other samples ({found}): set output= to another folder, or delete it.")
    return samples
