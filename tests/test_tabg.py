"""TA-BG's stages on a double well in the plane: they run, a killed one goes on to the same result, and its records are true."""

import json

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

import boltznce.methods.tabg as tabg
from boltznce.checkpoint import load_weights
from boltznce.config import compose
from boltznce.errors import UserError
from boltznce.flows.internal import InternalCoordinates
from boltznce.methods.drawing import draw_to_folder
from boltznce.methods.spline_models import make_coordinates, make_spline_flow
from boltznce.methods.workspace import Workspace, make_fabric
from boltznce.run import train
from boltznce.run_folder import RunFolder
from boltznce.systems.base import System
from boltznce.training import FitSettings

FIT = {"steps": 20, "lr": 1e-2, "log_every": 10, "validate_every": 0, "checkpoint_every": 10}
CONFIG = {
    "seed": 3,
    "method": {"name": "tabg"},
    "generator": {
        "box": [[-2.5, -2.5], [2.5, 2.5]],
        "coordinates": {"temperature": 1200.0, "fix_chirality": True, "fix_methyls": True},
        "model": {"n_pairs": 1, "width": 16, "depth": 1, "prior_std": 0.2},
    },
    "hot": {"temperature": 4.0, "batch_size": 64, "gradient": "path", "drop_highest": 2, "path_clip": 4.0, "energy_cut": 1e8, "fit": FIT},
    "annealing": {
        "temperature": 1.0,
        "n_steps": 2,
        "repeat_first": 0,
        "repeat_last": 1,
        "n_draws": 900,
        "n_buffer": 400,
        "clip": 1e-3,
        "draw_batch_size": 200,
        "batch_size": 64,
        "fit": FIT,
    },
    "evaluation": {"batch_size": 200},
}


class DoubleWell(System):
    name, n_atoms, dim, temperature, translation_invariant = "double_well", 1, 2, 1.0, False

    @property
    def positions(self):
        return torch.tensor([[-1.0, 0.0]])

    def energy(self, x):
        a, b = x[..., 0, 0], x[..., 0, 1]
        return (4 * (a**2 - 1) ** 2 + a / 2 + 2 * b**2) / self.temperature

    def coordinate(self, x, name):
        return x[..., 0, 0]


def work_in(path, system):
    config = OmegaConf.create(CONFIG)
    work = Workspace(RunFolder.create(path, config, system.name), config, make_fabric("cpu"))
    work.__dict__["system"] = system
    return work


def test_stages_and_a_kill_in_the_middle_of_one(tmp_path, monkeypatch):
    whole = work_in(tmp_path / "whole", DoubleWell())
    hot = tabg.train_hot(whole)
    assert hot["energy_evaluations"] == 20 * 64
    annealed = tabg.anneal(whole)
    assert annealed["energy_evaluations"] == 3 * 900
    assert [(step["drawn_at"], step["weighted_to"]) for step in annealed["steps"]] == [(4.0, 2.0), (2.0, 1.0), (1.0, 1.0)]
    assert all(0 < step["ess"] <= step["ess_clipped"] <= 1 for step in annealed["steps"])
    left = {path.name for path in (tmp_path / "whole" / "annealing").iterdir()}
    assert left == {"00.json", "01.json", "02.json"}  # buffers are gone

    killed = work_in(tmp_path / "killed", DoubleWell())
    tabg.train_hot(killed)
    forward_kl, calls = tabg.forward_kl, []

    def failing(log_q):
        calls.append(1)
        if len(calls) == 33:  # in the second stage, between two checkpoints
            raise KeyboardInterrupt
        return forward_kl(log_q)

    monkeypatch.setattr(tabg, "forward_kl", failing)
    with pytest.raises(KeyboardInterrupt):
        tabg.anneal(killed)
    again = work_in(tmp_path / "killed", DoubleWell())
    assert tabg.anneal(again) == annealed
    assert len(calls) == 33 + 10 + 20
    final = [load_weights(tmp_path / name / "checkpoints" / "anneal_02.safetensors")[0] for name in ("whole", "killed")]
    assert all(torch.equal(final[0][key], final[1][key]) for key in final[0])

    samples = draw_to_folder(again.models, tmp_path / "samples", 500, "auto", lambda k: again.generator("samples", k))
    assert len(samples) == 500
    assert samples.positions.shape[1:] == (1, 2)
    energy = DoubleWell().energy(torch.from_numpy(np.array(samples.positions)))
    np.testing.assert_allclose(samples.energy, energy, rtol=1e-6)
    np.testing.assert_allclose(samples.log_weights, -samples.energy - samples.log_prob)
    record = json.loads((tmp_path / "whole" / "annealing" / "01.json").read_text())
    assert record["steps"] == 20


TINY = [
    "system=aldp_amber96",
    "method=tabg",
    "budget=smoke",
    "threads=1",
    "generator.model={architecture: hierarchical, n_pairs: 2, width: 16, depth: 1}",
    "hot={batch_size: 32, fit: {steps: 5}}",
    "annealing={n_steps: 1, n_draws: 300, n_buffer: 100, draw_batch_size: 100, batch_size: 32, fit: {steps: 5}}",
    "evaluation={n_samples: 600, n_ladder: 100, batch_size: 200, n_bootstrap: 20}",
]


def test_whole_run_of_a_molecule_ends_in_a_report(tmp_path):
    config = compose("train", TINY)
    run = RunFolder.create(tmp_path, config, config.system.name)
    train(run)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["counts"]["energy evaluations, reverse KL"] == 5 * 32
    assert metrics["counts"]["energy evaluations, annealing"] == 600
    assert metrics["counts"]["with another chirality"] == 0
    assert "exact weights" in metrics["ess"]
    assert "ladder, 1200 to 300" in metrics["ess"]
    assert {path.stem for path in (tmp_path / "figures").iterdir()} >= {"ladder", "weights", "profile", "ramachandran", "temperatures"}
    assert "figures/ladder.png" in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize("budget", ["smoke", "cpu", "long", "paper"])
def test_every_budget_composes(budget):
    config = compose("train", ["system=aldp_amber96", "method=tabg", f"budget={budget}"])
    assert config.annealing.temperature == 300.0
    assert config.generator.coordinates.temperature == 1200.0
    assert (config.hot.fit.steps == 100000) == (budget == "paper")
    FitSettings(**config.hot.fit)
    FitSettings(**config.annealing.fit)


def test_unknown_gradient(tmp_path):
    work = work_in(tmp_path, DoubleWell())
    work.config.hot.gradient = "score"
    with pytest.raises(UserError, match=r"hot.gradient=score.*total, path"):
        tabg.train_hot(work)


def test_generator_of_a_molecule_and_of_a_plane():
    import boltznce as bz

    aldp = make_coordinates(bz.load_system("aldp"), OmegaConf.create(CONFIG["generator"]))
    assert isinstance(aldp, InternalCoordinates)
    assert aldp.zmatrix.root == (1, 4, 6)  # the main chain
    assert len(aldp.methyls) == 3
    with pytest.raises(UserError, match="needs a box"):
        make_coordinates(DoubleWell(), OmegaConf.create({"box": None}))
    config = OmegaConf.create(CONFIG)
    first, second = (make_spline_flow(config, DoubleWell()) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
