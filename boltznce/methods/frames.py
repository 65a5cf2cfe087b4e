"""Positions to train on: frames of a simulation with rare states made frequent, draws of a flow with their likelihoods."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from boltznce.analysis.reweighting import WeightedSamples
from boltznce.data.dataset import Dataset, boltzmann_indices, mode_balanced_indices
from boltznce.systems.base import System

__all__ = ["balanced_frames", "drawn_samples", "minibatch"]


def balanced_frames(system: System, frames: Dataset, n: int, balance: dict | None, rng: np.random.Generator) -> Tensor:
    """``n`` frames (n, atoms, dim) of a dataset in which the rare state is as frequent as ``balance`` says (None: as it is)."""
    if balance is None:
        return torch.from_numpy(frames.positions[boltzmann_indices(frames.log_weights, n, rng)])
    name, state = system.state
    phi = system.coordinate(np.asarray(frames.positions), name)
    return torch.from_numpy(frames.positions[mode_balanced_indices(phi, frames.log_weights, n, rng, state=state, **balance)])


def drawn_samples(folder: Path, device: torch.device) -> tuple[Tensor, Tensor]:
    """Positions and log q (float32) of a folder of the flow's draws, without those of no finite energy or likelihood."""
    samples = WeightedSamples.load(folder)
    fine = np.isfinite(samples.energy) & (np.isfinite(samples.log_prob) | np.isnan(samples.log_prob).all())
    x, log_q = torch.from_numpy(samples.positions[fine]), torch.from_numpy(samples.log_prob[fine]).float()
    return x.to(device), log_q.to(device)


def minibatch(x: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """``size`` rows of ``x``, drawn with replacement."""
    return x[torch.randint(len(x), (size,), generator=generator, device=x.device)]
