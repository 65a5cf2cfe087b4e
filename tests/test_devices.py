"""One run in several processes has the results of one; it is stopped, resumed, and refused where it cannot be."""

import csv
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import test_training
import torch
from forks import BOLTZNCE
from lightning_fabric import Fabric
from lightning_fabric.plugins.precision import MixedPrecision

from boltznce import UserError, ranks
from boltznce.config import compose
from boltznce.data.batching import Batches
from boltznce.ebm import EnergyBasedModel
from boltznce.flows.interpolant_flow import InterpolantFlow
from boltznce.methods.preflight import preflight
from boltznce.methods.workspace import make_fabric
from boltznce.networks.egnn import EGNNVectorField
from boltznce.networks.mlp import MLPEnergy
from boltznce.requeue import requeued
from boltznce.run import resume_folder
from boltznce.run_folder import RunFolder
from boltznce.training import FitSettings, fit

RUN = [
    *BOLTZNCE,
    "evaluation.refine=null",
    "evaluation.n_samples=300",
    "ebm.batch_size=63",
]  # one has a row more


@pytest.fixture(scope="module")
def one(forks, tmp_path_factory):
    """The folder of a run in one process."""
    folder = tmp_path_factory.mktemp("devices")
    done = forks.run("train", *RUN, "hydra.run.dir=one", cwd=folder)
    assert done.status == 0, done.output
    return folder / "one"


def rows(path):
    with open(path) as handle:
        return [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(handle)]


def wait_for(child, path, n):
    """Until a log has so many rows."""
    while child.poll() is None and (not path.exists() or len(rows(path)) < n):
        time.sleep(0.02)
    assert child.status is None, child.output


def same(one, two):
    for name in ("flow", "ebm"):
        ours, theirs = rows(one / f"{name}.csv"), rows(two / f"{name}.csv")
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs, strict=True):
            assert b == pytest.approx(a | {"seconds": b["seconds"]}, rel=1e-4, abs=1e-5)
    for name in ("train", "weighted", "exact_uniform"):
        for array in ("positions", "log_prob"):
            a, b = (np.load(folder / "samples" / name / f"{array}.npy") for folder in (one, two))
            if (name, array) == ("weighted", "log_prob"):  # an EBM's, up to a constant, which the losses do not see
                a, b = a - a.mean(), b - b.mean()
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_two_processes_stopped_and_resumed_give_the_losses_and_samples_of_one(forks, one):
    folder = one.parent
    child = forks.start("train", *RUN, "hydra.run.dir=two", "devices=2", "flow.fit.checkpoint_every=1000", cwd=folder)
    wait_for(child, folder / "two/flow.csv", 5)
    child.kill(signal.SIGTERM)
    assert child.wait() == 128 + signal.SIGTERM, child.output
    (told,) = child.told
    assert "resume=" in told
    (checkpoint,) = (folder / "two/checkpoints/flow").iterdir()  # of the very step
    assert 5 <= int(checkpoint.name[-7:]) < 40
    done = forks.run("train", "resume=two", cwd=folder)
    assert done.status == 0, done.output
    same(one, folder / "two")
    assert "devices: 2" in (folder / "two/config.yaml").read_text()


@pytest.mark.slow
def test_a_process_that_dies_ends_the_run_which_then_goes_on_in_one(forks, one):
    folder = one.parent
    child = forks.start("train", *RUN, "hydra.run.dir=died", "devices=3", cwd=folder)
    wait_for(child, folder / "died/flow.csv", 15)
    listed = subprocess.run(["pgrep", "-P", str(child.pid)], capture_output=True, text=True, check=True)
    os.kill(int(listed.stdout.split()[-1]), signal.SIGKILL)
    assert child.wait() == 1
    assert "ended" in child.output
    done = forks.run("train", "resume=died", "devices=1", cwd=folder)
    assert done.status == 0, done.output
    same(one, folder / "died")


@pytest.mark.slow
def test_processes_of_torchrun(one):
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "boltznce",
    ]
    command = [*launcher, "train", *RUN, "devices=2"]
    done = subprocess.run([*command, "hydra.run.dir=torchrun"], cwd=one.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    same(one, one.parent / "torchrun")
    refused = subprocess.run(command, cwd=one.parent, capture_output=True, text=True)
    assert "need one folder: add hydra.run.dir=" in refused.stderr


# ---- shares of a batch ----------------------------------------------------------------------------------------------


def padded():
    sizes = (4, 6, 5)
    positions = [np.random.default_rng(n).normal(size=(8, n, 3)).astype(np.float32) for n in sizes]
    return Batches(positions, [torch.randn(n, 2) for n in sizes], 10, seed=0, max_padding=0.5)(0)


def losses():
    """name -> a model's loss of a batch, with the same random numbers at each call."""
    torch.manual_seed(0)
    plane = torch.randn(10, 1, 2)
    ebm = EnergyBasedModel(MLPEnergy(width=8, n_blocks=1), 1, 2, centred=False, n_negatives=2)
    x, molecules = padded()
    network = EGNNVectorField(n_features=2, width=8, n_layers=2)
    flow = InterpolantFlow(network, 6, 3, features=torch.zeros(6, 2), coupling="ot").on(molecules)
    numbers = torch.Generator
    return {
        "ebm": (ebm, lambda: ebm.loss(plane, numbers().manual_seed(1))["loss"]),
        "padded flow": (network, lambda: flow.loss(x, numbers().manual_seed(1))),
    }


@pytest.mark.parametrize("name", ["ebm", "padded flow"])
def test_shares_of_a_batch_average_to_its_loss_and_gradient(monkeypatch, name):
    module, loss = losses()[name]

    def gradient():
        module.zero_grad()
        value = loss()
        value.backward()
        grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in module.parameters()]
        return value.detach(), torch.cat([grad.flatten() for grad in grads])

    whole, shares = gradient(), []
    monkeypatch.setattr(ranks, "size", lambda: 3)
    for rank in range(3):
        monkeypatch.setattr(ranks.distributed, "get_rank", lambda rank=rank: rank)
        with ranks.sharing():
            shares.append(gradient())
    for all_of_it, parts in zip(whole, zip(*shares, strict=True), strict=True):
        torch.testing.assert_close(torch.stack(parts).mean(0), all_of_it, rtol=1e-4, atol=1e-6)
    with ranks.sharing():
        assert ranks.part(2) == slice(None)  # fewer rows than processes: each has all
        assert ranks.mean_of_all(torch.tensor([1.0, 3.0]), 2) == 2


def test_a_training_with_loss_scaling_is_resumed_to_the_bit(tmp_path):
    def train(folder, steps, loss=test_training.noisy_loss):
        fabric = Fabric(accelerator="cpu", plugins=[MixedPrecision("16-mixed", "cpu")])
        module, settings = test_training.Line(), FitSettings(steps=8, checkpoint_every=steps, log_every=1, lr=1e-2)
        return module, fit(module, loss, settings, folder, fabric=fabric, seed=0, name="line")

    def interrupted(module, step, generator):
        if step == 6:
            raise KeyboardInterrupt
        return test_training.noisy_loss(module, step, generator)

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "killed", 5, interrupted)
    (resumed, result), (whole, _) = train(tmp_path / "killed", 5), train(tmp_path / "whole", 5)
    assert torch.equal(resumed.a, whole.a)
    assert (result.steps, result.skipped_steps) == (8, 0)
    assert whole.a != test_training.Line().a


# ---- settings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["devices=3", "device=cuda"], "device=cuda devices=3 cannot be used"),
        (["devices=0"], "devices=0 must be a whole number, 1 or more"),
        (["devices=2", "device=cuda:1"], "device=cuda:1 is one device, not devices=2"),
        (["num_nodes=2"], "start them with srun, or with torchrun"),
        (["strategy=fsdp"], "choose one of auto, ddp"),
        (["precision=8"], "16-mixed, bf16-mixed"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="there are GPUs")
def test_devices_that_are_not_there(words, message):
    with pytest.raises(UserError, match=message):
        preflight(compose("train", ["system=gaussians8", "budget=smoke", *words]))


def test_as_many_processes_as_devices(monkeypatch):
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="4 processes were started, and devices=1 of num_nodes=1 are 1"):
        make_fabric("cpu")
    assert make_fabric("cpu", devices=2, num_nodes=2).world_size == 4


def test_a_run_goes_on_with_other_settings_that_change_nothing_that_was_trained(one):
    with pytest.raises(UserError, match=r"leave out flow\.batch_size, or start a new run"):
        resume_folder(one, {"threads": 2, "flow.batch_size": 3}, trust=True)
    with pytest.raises(UserError, match="device=cuda cannot be used"):
        resume_folder(one, {"device": "cuda"}, trust=True)
    assert RunFolder.open(one).config.threads == 1
    resume_folder(one, {"threads": 2, "evaluation.n_bootstrap": 30, "flow.fit.checkpoint_every": 7}, trust=True)
    run = RunFolder.open(one)
    assert (run.config.threads, run.config.flow.fit.checkpoint_every) == (2, 7)
    assert run.stage_done("evaluation")
    resume_folder(one, {"evaluation.n_exact": 16}, trust=True)
    assert not run.stage_done("evaluation")
    assert run.stage_done("ebm")
    assert (one / "aside-1/samples/weighted/positions.npy").exists()


def test_slurm_is_asked_to_queue_a_job_again_on_sigusr1_alone(tmp_path, monkeypatch):
    assert requeued(signal.SIGUSR1) is None
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "did not queue job 17 again" in requeued(signal.SIGUSR1)
    (tmp_path / "scontrol").write_text(f"#!/bin/sh\necho $@ > {tmp_path}/asked\n")
    (tmp_path / "scontrol").chmod(0o755)
    assert requeued(signal.SIGTERM) is None
    assert requeued(signal.SIGUSR1) == "SLURM has queued job 17 again."
    assert (tmp_path / "asked").read_text() == "requeue 17\n"
