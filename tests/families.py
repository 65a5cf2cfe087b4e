"""A tiny run of many molecules in seconds: settings, data that stand in for simulations, and a check let through."""

import numpy as np
import pytest
import torch
from omegaconf import DictConfig

import boltznce as bz
from boltznce.config import compose
from boltznce.data.dataset import Dataset
from boltznce.run import RunFolder, train
from boltznce.systems.bond_graph import BondGraph, GraphCheck
from boltznce.systems.conformers import random_conformers

N_FRAMES = 60
TINY = [
    "budget=smoke",
    "threads=1",
    "flow.fit.steps=4",
    "flow.fit.validate_every=2",
    "flow.network.width=16",
    "flow.network.embedding_width=8",
    "flow.solver.steps=2",
    "flow.n_train=200",
    "flow.n_validation=8",
    "flow.batch_size=16",
    "samples.n_train=16",
    "samples.n_validation=4",
    "samples.batch_size=16",
    "ebm.network.width=16",
    "ebm.network.embedding_width=8",
    "ebm.fit.steps=2",
    "ebm.fit.validate_every=2",
    "ebm.batch_size=16",
    "evaluation.n_samples=40",
    "evaluation.n_exact=4",
    "evaluation.batch_size=32",
    "evaluation.exact_batch_size=4",
    "evaluation.n_bootstrap=20",
    "evaluation.n_torus=30",
]


def fake_data(folder, sequences):
    """Rough conformers in place of a simulation: whatever a dataset's frames are, the stages must run on them."""
    for k, sequence in enumerate(sequences):
        system = bz.load_system(sequence)
        x = random_conformers(system.positions, system.bonds, 8 * N_FRAMES, torch.Generator().manual_seed(k))
        energies = system.energy(x.double()).numpy()
        best = np.sort(np.argsort(energies)[:N_FRAMES])
        meta = {"system": system.identity, "settings": {"method": "replica_exchange"}, "cpu_seconds": 10.0}
        Dataset.write(folder / sequence, x[best].numpy(), energies[best], window=np.arange(N_FRAMES) % 2, meta=meta)


def config_of(data, *words) -> DictConfig:
    return compose("train", ["system=dipeptides", *TINY, f"data_dir={data}", *words])


def finish(folder, data):
    """A finished tiny run in a folder.

    Its flow has learned next to nothing, so draws keep few conformers: the check of bonds is let through.
    """
    config = config_of(data)
    with pytest.MonkeyPatch.context() as patch:
        accept_everything(patch)
        train(RunFolder.create(folder, config, config.system.name))
    return folder


def accept_everything(patch):
    """Let every conformer pass for the molecule."""

    def check(self, x, batch_size=1024):
        n, atoms = x.shape[:2]
        right, reordered = torch.ones(n, dtype=torch.bool), torch.zeros(n, dtype=torch.bool)
        return GraphCheck(right, torch.arange(atoms).repeat(n, 1), reordered)

    patch.setattr(BondGraph, "check", check)
