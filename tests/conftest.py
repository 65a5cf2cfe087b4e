"""One tiny finished run, shared by every test that needs a run folder.

One thread a test process, as there is one on every core.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; processes that tests start inherit it

import pytest
import torch
from forks import Forks

from boltznce.methods import models
from boltznce.run import train_run

TINY = [
    "budget=smoke",
    "threads=1",
    "data.simulation.duration=4",
    "data.simulation.n_repeats=1",
    "data.simulation.equilibration=1",
    "data.simulation.segment_length=2",
    "data.simulation.n_windows=12",
    "flow.network.width=32",
    "flow.network.n_rounds=2",
    "flow.n_train=2000",
    "flow.n_validation=128",
    "flow.batch_size=128",
    "flow.fit.steps=100",
    "flow.fit.warmup_steps=20",
    "flow.fit.validate_every=50",
    "flow.solver.steps=6",
    "samples.n_train=128",
    "samples.n_validation=64",
    "samples.batch_size=64",
    "ebm.network.width=32",
    "ebm.batch_size=64",
    "ebm.fit.steps=20",
    "ebm.fit.validate_every=10",
    "evaluation.n_samples=256",
    "evaluation.batch_size=256",
    "evaluation.n_bootstrap=50",
    "evaluation.n_torus=100",
]


@pytest.fixture(scope="session")
def forks():
    """What runs scripts, without the seconds that each would take to import."""
    with Forks() as forks:
        yield forks


@pytest.fixture(scope="session")
def tiny_overrides(tmp_path_factory):
    """Overrides of ``boltznce train`` that make a run of seconds."""
    return [*TINY, f"data_dir={tmp_path_factory.mktemp('data')}"]


@pytest.fixture(scope="session")
def tiny_run(tiny_overrides, tmp_path_factory):
    """The folder of a finished tiny run of alanine dipeptide."""
    threads = torch.get_num_threads()
    folder = tmp_path_factory.mktemp("run")
    train_run(folder, *tiny_overrides)
    torch.set_num_threads(threads)
    return folder


@pytest.fixture(scope="module")
def few_conformers():
    """Calibration on few rough conformers, for runs whose numbers mean nothing anyway."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "N_CONFORMERS", 32)
        yield
