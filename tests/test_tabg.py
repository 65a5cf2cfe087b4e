"""TA-BG's stages on a double well: they run, a killed one goes on to the same result, and its records are true."""

import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from runs import run_in

import boltznce as bz
from boltznce.analysis.reweighting import WeightedSamples
from boltznce.checkpoint import load_weights
from boltznce.config import compose
from boltznce.data.dataset import Dataset
from boltznce.data.jobs import force_evaluations
from boltznce.errors import UserError
from boltznce.flows.internal import InternalCoordinates
from boltznce.methods import density, tabg
from boltznce.methods.drawing import draw_to_folder
from boltznce.methods.models import load_trained
from boltznce.methods.spline_models import SplineGenerator, make_coordinates, make_spline_flow
from boltznce.methods.workspace import Workspace, make_fabric
from boltznce.run import train
from boltznce.run_folder import RunFolder
from boltznce.systems.base import System
from boltznce.systems.isomers import allowed_conformers, excluded_conformers
from boltznce.training import FitSettings

FIT = {"steps": 20, "lr": 1e-2, "log_every": 10, "validate_every": 0, "checkpoint_every": 10}
CONFIG = {
    "seed": 3,
    "method": {"name": "tabg", "_target_": "boltznce.methods.tabg"},
    "generator": {
        "box": [[-2.5, 2.5], [-2.5, 2.5]],
        "coordinates": {"temperature": 1200.0, "fix_chirality": True, "fix_methyls": True},
        "model": {"n_pairs": 1, "width": 16, "depth": 1, "prior_std": 0.2},
    },
    "hot": {
        "temperature": 4.0,
        "objective": "reverse_kl",
        "batch_size": 64,
        "drop_highest": 2,
        "energy_cut": 1e8,
        "deviation": 3.0,
        "covering": 0.3,
        "fit": FIT,
    },
    "annealing": {
        "temperature": 1.0,
        "n_steps": 2,
        "repeat_first": 0,
        "repeat_between": 0,
        "repeat_last": 1,
        "n_draws": 900,
        "objective": "forward_kl",
        "n_buffer": 400,
        "energy_cut": 1e8,
        "deviation": 3.0,
        "covering": 0.3,
        "last_lr": 1e-3,
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


@pytest.mark.parametrize("objective", ["forward_kl", "log_variance", "path_kl"])
def test_stages_and_a_kill_in_the_middle_of_one(tmp_path, monkeypatch, objective):
    monkeypatch.setitem(CONFIG["annealing"], "objective", objective)
    whole = work_in(tmp_path / "whole", DoubleWell())
    hot = tabg.train_hot(whole)
    assert hot["energy_evaluations"] == 20 * 64
    annealed = tabg.anneal(whole)
    assert annealed["energy_evaluations"] == 3 * (900 + (0 if objective == "forward_kl" else 20 * 64))
    assert [(step["drawn_at"], step["weighted_to"]) for step in annealed["steps"]] == [
        (4.0, 2.0),
        (2.0, 1.0),
        (1.0, 1.0),
    ]
    assert all(0 < step["ess"] <= step["ess_clipped"] <= 1 for step in annealed["steps"])
    left = {path.name for path in (tmp_path / "whole" / "annealing").iterdir()}
    assert left == {"00.json", "01.json", "02.json"}  # buffers are gone

    killed = work_in(tmp_path / "killed", DoubleWell())
    tabg.train_hot(killed)
    loss, calls = getattr(tabg, objective), []

    def failing(*arguments):
        calls.append(1)
        if len(calls) == 33:  # in the second stage, between two checkpoints
            raise KeyboardInterrupt
        return loss(*arguments)

    monkeypatch.setattr(tabg, objective, failing)
    with pytest.raises(KeyboardInterrupt):
        tabg.anneal(killed)
    again = work_in(tmp_path / "killed", DoubleWell())
    assert tabg.anneal(again) == annealed
    assert len(calls) == 33 + 10 + 20
    final = [load_weights(tmp_path / name / "checkpoints" / "anneal_02.safetensors")[0] for name in ("whole", "killed")]
    assert all(torch.equal(final[0][key], final[1][key]) for key in final[0])

    generator = again.models.of(again.system)
    samples = draw_to_folder(
        generator, tmp_path / "samples", 500, "auto", lambda k: again.generator("samples", index=k)
    )
    assert len(samples) == 500
    assert samples.positions.shape[1:] == (1, 2)
    energy = DoubleWell().energy(torch.from_numpy(np.array(samples.positions)))
    np.testing.assert_allclose(samples.energy, energy, rtol=1e-6)
    np.testing.assert_allclose(samples.log_weights, -samples.energy - samples.log_prob)
    record = json.loads((tmp_path / "whole" / "annealing" / "01.json").read_text())
    assert record["steps"] == 20


@pytest.mark.parametrize("begun", [True, False])
def test_samples_go_on_with_no_other_weights(tmp_path, monkeypatch, begun):
    """Neither finished nor begun draws are taken for those of a flow that has been trained anew."""
    work = work_in(tmp_path / "run", DoubleWell())
    generator = SplineGenerator(work.config, work.system, make_spline_flow(work.config, work.system))

    def draw(n_batches=3):
        def numbers(k):
            if k == n_batches:
                raise KeyboardInterrupt
            return work.generator("samples", index=k)

        return draw_to_folder(generator, tmp_path / "samples", 500, "exact", numbers)

    if begun:
        with pytest.raises(KeyboardInterrupt):
            draw(n_batches=1)
    else:
        draw()
    weights = next(generator.flow.parameters())
    before = weights.detach().clone()
    with torch.no_grad():
        weights[..., 0] += 1e-6
    with pytest.raises(UserError, match="weights"):
        draw()
    with torch.no_grad():
        weights.copy_(before)
    assert len(draw()) == 500


BASELINES = {"forward_kl": "method=forward_kl", "reverse_kl": "experiment=tabg/reverse_kl"}
SPLINE = [
    "budget=smoke",
    "threads=1",
    "generator.model={architecture: hierarchical, n_pairs: 2, width: 16, depth: 1}",
    "hot={batch_size: 32, fit: {steps: 5}}",
    "evaluation={n_samples: 600, n_ladder: 100, batch_size: 200, n_bootstrap: 20, n_torus: 50}",
]
TINY = [
    "system=aldp_amber96",
    "method=tabg",
    *SPLINE,
    "annealing={n_steps: 1, n_draws: 300, n_buffer: 100, draw_batch_size: 100, batch_size: 32, fit: {steps: 5}}",
]


@pytest.fixture(scope="module")
def tabg_run(tmp_path_factory):
    """The folder of a finished tiny run of alanine dipeptide, without data; they would be in ``data`` beside it."""
    folder = tmp_path_factory.mktemp("tabg")
    run_in(folder / "run", [*TINY, f"data_dir={folder / 'data'}"])
    return folder / "run"


@pytest.fixture(scope="module")
def flow_as_data(tabg_run):
    """The run's own draws, equally weighted, as if a simulation had made them: (folder, log q)."""
    samples = WeightedSamples.load(tabg_run / "samples" / "weighted")
    system = bz.load_run(tabg_run).system
    n = len(samples)
    meta = {"system": system.identity, "settings": {"method": "none", "temperature": 300.0}}
    folder = tabg_run.parent / "data" / "aldp_amber96_metadynamics"
    Dataset.write(folder, np.array(samples.positions), samples.energy, repeat=np.arange(n) % 2, meta=meta)
    return folder, samples.log_prob


def test_whole_run_of_a_molecule_ends_in_a_report(tabg_run):
    metrics = json.loads((tabg_run / "metrics.json").read_text())
    assert metrics["counts"]["energy evaluations, first temperature"] == 5 * 32
    assert metrics["counts"]["energy evaluations, annealing"] == 600
    assert metrics["counts"]["energy evaluations, training in all"] == 5 * 32 + 600
    assert metrics["excluded"]["inverted stereocentre"] == {"n": 0, "by_count": 0.0, "by_weight": 0.0}
    cis = metrics["excluded"]["peptide bond turned"]
    assert cis["by_count"] == cis["n"] / 600
    assert 0 < cis["by_weight"] < 1
    assert metrics["ess"]["exact weights"]["ess"] <= metrics["ess"]["exact weights, top 0.01% clipped"]["ess"]
    assert "ladder, 1200 to 300" in metrics["ess"]
    figures = {path.stem for path in (tabg_run / "figures").iterdir()}
    assert figures >= {"ladder", "weights", "profile", "ramachandran", "marginals", "temperatures", "learning_curves"}
    text = (tabg_run / "report.md").read_text()
    assert "figures/ladder.png" in text
    assert "`boltznce simulate system=aldp_amber96" in text  # there is nothing to compare with, and how to get it


def test_serving(tabg_run, tmp_path):
    run = bz.load_run(tabg_run)
    samples = run.sample(250, likelihood="exact", seed=1)
    assert samples.positions.shape == (250, 22, 3)
    np.testing.assert_allclose(samples.log_weights, -samples.energy - samples.log_prob)
    x = torch.from_numpy(samples.positions)
    np.testing.assert_allclose(samples.energy, run.system.energy(x), rtol=1e-4, atol=1e-2)
    given = run.generator().log_prob(x)
    np.testing.assert_allclose(given, samples.log_prob, atol=0.05)  # float32 positions
    saved = run.sample(250, seed=1, folder=tmp_path / "samples")
    np.testing.assert_array_equal(saved.positions, samples.positions)
    assert saved.meta["likelihood"] == "exact"
    assert np.isnan(run.sample(3, likelihood="none").log_prob).all()
    for likelihood in ("ebm", "hutchinson"):
        with pytest.raises(UserError, match=f"likelihood={likelihood}: choose one of exact, none"):
            run.sample(3, likelihood=likelihood)


def test_scripts_serve_a_run(tabg_run, tmp_path, capsys):
    def script(name, *overrides):
        spec = importlib.util.spec_from_file_location(name, Path(__file__).parents[1] / "scripts" / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        module.main(compose(name, overrides))
        return capsys.readouterr().out

    assert "40 samples" in script(
        "sample", f"run={tabg_run}", "n_samples=40", f"output={tmp_path / 'samples'}", "format=dcd"
    )
    assert (tmp_path / "samples" / "trajectory.dcd").exists()
    assert "exact weights" in script("free_energy", f"run={tabg_run}", f"output={tmp_path / 'fe'}", "n_bootstrap=20")
    assert (tmp_path / "fe" / "figures" / "profile.png").exists()


def test_nothing_to_draw_from(tabg_run, tmp_path):
    run = bz.load_run(tabg_run)
    for method, message in ((tabg, "no trained flow"), (density, "nothing to draw from")):
        with pytest.raises(UserError, match=message):
            method.load_models(tmp_path, run.config, run.system, torch.device("cpu")).of(run.system)


def test_report_with_data_that_are_the_flow_itself(tabg_run, flow_as_data, tmp_path):
    """The report of a finished run whose data have come since. Data drawn from the flow have the flow's entropy."""
    shutil.copytree(tabg_run, tmp_path / "run")
    train(RunFolder.open(tmp_path / "run"))
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    samples = WeightedSamples.load(tabg_run / "samples" / "weighted")
    kept = allowed_conformers(excluded_conformers(bz.load_run(tabg_run).system, samples.positions), len(samples))
    found = metrics["held_out"]["flow at 300"]
    assert found["n"] == kept.sum()
    assert found["n_outside"] <= 2  # by rounding, at the edges of the domain
    assert found["nll"] == pytest.approx(-flow_as_data[1][kept].mean(), abs=0.1)
    kl = metrics["distances"]["KL of (φ, ψ)"]
    assert kl["unweighted"] < kl["floor"]  # the same points, once against all and once against the other half
    assert kl["unweighted"] < kl["weighted"]
    assert metrics["distances"]["E-W2 (kT)"]["unweighted"] is not None
    cis = metrics["excluded"]["peptide bond turned"]
    assert cis["data"] == pytest.approx(cis["by_count"])
    assert {path.stem for path in (tmp_path / "run" / "figures").iterdir()} >= {"energy_histograms", "temperatures"}
    assert "boltznce simulate" not in (tmp_path / "run" / "report.md").read_text()


def test_baseline_forward_kl(flow_as_data, tmp_path):
    overrides = [
        "system=aldp_amber96",
        "method=forward_kl",
        *SPLINE,
        f"data.folder={flow_as_data[0]}",
        "data.simulation=null",
    ]
    flow = "flow={n_train: 500, n_validation: 100, batch_size: 50, fit: {steps: 12, validate_every: 6}}"
    metrics = run_in(tmp_path, [*overrides, flow])
    assert metrics["method"] == "forward_kl"
    assert metrics["counts"]["energy evaluations, training in all"] == 0
    assert metrics["held_out"]["flow at 300"]["n"] < 0.21 * 600  # of the test part alone
    assert bz.load_run(tmp_path).sample(3).log_prob.shape == (3,)


def test_baseline_reverse_kl(tmp_path):
    metrics = run_in(tmp_path, ["experiment=tabg/reverse_kl", *SPLINE, f"data_dir={tmp_path}"])
    run = bz.load_run(tmp_path)
    assert (metrics["system"], metrics["method"]) == ("aldp_amber96", "reverse_kl")
    assert (tabg.ladder(run.config), metrics["settings"]["temperatures"]) == ([], "300")  # of its only flow
    assert run.generator().system.temperature == 300.0
    assert run.config.generator.coordinates.temperature == 1200.0  # the flow is TA-BG's
    assert metrics["counts"]["energy evaluations, training in all"] == 5 * 32
    assert not (tmp_path / "figures" / "ladder.png").exists()


@pytest.mark.slow
def test_a_run_in_the_plane(tmp_path):
    sizes = ["annealing={n_draws: 400, n_buffer: 400, fit: {steps: 4}}", "hot.fit.steps=4"]
    small = "evaluation={n_samples: 400, n_ladder: 200, n_reference: 400, n_bootstrap: 20, n_torus: 100}"
    metrics = run_in(tmp_path, ["system=gaussians40", "method=tabg", "budget=smoke", "threads=1", *sizes, small])
    assert len(metrics["modes"]["exact"]) == 40
    assert metrics["held_out"]["flow at 1"]["n"] == 400
    assert {path.stem for path in (tmp_path / "figures").iterdir()} >= {"plane", "temperatures", "ladder", "profile"}


@pytest.mark.slow
@pytest.mark.parametrize("method", BASELINES)
def test_baselines_in_the_plane(tmp_path, method):
    small = "evaluation={n_samples: 400, n_reference: 400, n_bootstrap: 20, n_torus: 100}"
    fits = ["hot.fit.steps=4", *(["flow.fit.steps=4"] if method == "forward_kl" else [])]
    settings = [BASELINES[method], "budget=smoke", "threads=1", f"data_dir={tmp_path}", *fits, small]
    metrics = run_in(tmp_path / "run", ["system=gaussians8", *settings])
    assert len(metrics["modes"]["exact"]) == 8


def test_the_checkerboard_has_no_gradient_to_train_on(tmp_path):
    with pytest.raises(UserError, match=r"checkerboard has no gradient, which hot.objective=reverse_kl needs"):
        run_in(tmp_path, ["system=checkerboard", "method=tabg", "budget=smoke", "threads=1"])
    assert not (tmp_path / "checkpoints").exists()


def test_force_evaluations_of_a_simulation():
    settings = {
        "method": "umbrella",
        "n_repeats": 2,
        "equilibration": 50.0,
        "timestep": 0.002,
        "options": {"n_windows": 24, "kappa": 60.0},
    }
    assert force_evaluations({"settings": settings, "ps_per_walker": 150.0}) == 2 * 24 * 100_000
    assert force_evaluations({"settings": {"method": "exact"}}) == 0


@pytest.mark.parametrize("budget", ["smoke", "cpu", "gpu", "long", "paper"])
def test_every_budget_composes(budget):
    config = compose("train", ["system=aldp_amber96", "method=tabg", f"budget={budget}"])
    assert "ebm" not in config
    assert config.annealing.temperature == 300.0
    assert config.generator.coordinates.temperature == 1200.0
    assert (config.hot.fit.steps == 100000) == (budget == "paper")
    for section in (config.hot, config.annealing):
        FitSettings(**section.fit)
    plane = compose("train", ["system=gaussians40", "method=tabg", f"budget={budget}"])
    assert (plane.hot.temperature, plane.annealing.temperature, plane.budget) == (30.0, 1.0, budget)
    ours = OmegaConf.to_container(config.generator, resolve=True)
    for method, words in BASELINES.items():
        baseline = compose("train", ["system=aldp_amber96", words, f"budget={budget}"])
        assert (baseline.method.name, baseline.budget) == (method, budget)
        assert OmegaConf.to_container(baseline.generator, resolve=True) == ours
        planar = compose("train", ["system=gaussians40", words, f"budget={budget}"])
        assert (planar.generator.model, planar.generator.box) == (plane.generator.model, plane.generator.box)
    names = ("tetrapeptide", "hexapeptide")
    larger = [compose("train", [f"system={name}", "method=tabg", f"budget={budget}"]) for name in names]
    sizes = [part.annealing.fit.steps for part in (config, *larger)]
    assert sizes == sorted(sizes, reverse=True)
    assert (sizes[0] > sizes[2]) == (budget in ("cpu", "long", "paper"))
    assert {part.budget for part in larger} == {budget}
    for annealed, direct in ((config, baseline), (plane, planar)):
        section = annealed.annealing
        a_stage = section.n_draws + (section.fit.steps * section.batch_size if section.objective != "forward_kl" else 0)
        spent = annealed.hot.fit.steps * annealed.hot.batch_size + a_stage * len(tabg.ladder(annealed))
        assert direct.hot.fit.steps * direct.hot.batch_size == pytest.approx(spent, rel=0.02)
        assert (direct.hot.temperature, direct.hot.objective) == (direct.system.temperature, "reverse_kl")
    # no less energy, or none, at a quarter of the temperature
    assert baseline.hot.energy_cut >= min(4 * config.hot.energy_cut, 1e8)


@pytest.mark.parametrize(
    ("name", "method", "system"),
    [
        ("aldp", "tabg", "aldp"),
        ("aldp_amber96", "tabg", "aldp_amber96"),
        ("tetrapeptide", "tabg", "tetrapeptide"),
        ("hexapeptide", "tabg", "hexapeptide"),
        ("gaussians40", "tabg", "gaussians40"),
        ("forward_kl", "forward_kl", "aldp_amber96"),
        ("reverse_kl", "reverse_kl", "aldp_amber96"),
        ("fab", "fab", "aldp_amber96"),
    ],
)
def test_experiments_pin_the_published_setting(name, method, system):
    config = compose("train", [f"experiment=tabg/{name}"])
    assert (config.method.name, config.system.name, config.budget) == (method, system, "paper")
    if name == "aldp":
        ladder = tabg.ladder(config)
        published = [1028.69, 881.84, 755.95, 648.04, 555.52, 476.22, 408.24, 349.96, 300.0, 300.0]
        assert [round(cold, 2) for _, cold in ladder] == published
        assert config.annealing.fit.steps * config.annealing.batch_size == 30_000 * 2048
    if name == "hexapeptide":
        assert len(tabg.ladder(config)) == 18
        assert [round(cold) for _, cold in tabg.ladder(config)[:4]] == [1029, 1029, 882, 882]
    if name == "gaussians40":
        published = [18.46, 11.35, 6.99, 4.3, 2.64, 1.63, 1.0, 1.0]
        assert [cold for _, cold in tabg.ladder(config)] == pytest.approx(published, abs=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["aldp", "aldp_amber96", "tetrapeptide", "hexapeptide"])
def test_first_steps_of_the_published_setting(tmp_path, name):
    """Networks and batches of the published size, two steps at 1200 K and in each of two stages down."""
    few = [
        "hot.fit.steps=2",
        "annealing.fit.steps=2",
        "annealing.n_steps=1",
        "annealing.repeat_between=0",
        "annealing.repeat_last=1",
    ]
    draws = ["annealing.n_draws=3000", "annealing.n_buffer=3000", "evaluation.n_samples=300", "evaluation.n_ladder=100"]
    logged = ["+hot.fit.log_every=1", "+annealing.fit.log_every=1", f"data_dir={tmp_path}"]
    run = bz.train_run(tmp_path / name, f"experiment=tabg/{name}", *few, *draws, *logged)
    model = run.config.generator.model
    assert (model.width, model.depth, model.n_pairs) == (256, 5, 8)
    assert run.metrics["counts"]["energy evaluations, training in all"] == 2 * run.config.hot.batch_size + 2 * 3000
    for stage in ("hot", "anneal_00", "anneal_01"):
        log = np.genfromtxt(run.path / f"{stage}.csv", delimiter=",", names=True)
        assert log.shape == (2,)
        assert np.isfinite(log["trainloss"]).all()


@pytest.mark.parametrize(("name", "mean"), [("aldp_amber96", 14.4), ("tetrapeptide", 48.9), ("hexapeptide", 79.7)])
def test_typical_energy_is_about_the_mean_one(name, mean):
    """At 1200 K, against that of umbrella sampling at 300 K carried there by equipartition; zero in the plane."""
    assert bz.load_system(name).at_temperature(1200.0).typical_energy() == pytest.approx(mean, abs=3.0)
    assert bz.load_system("double_well").typical_energy() == 0.0


@pytest.mark.parametrize(
    ("stage", "known"),
    [("hot", "reverse_kl, log_variance, path_kl"), ("annealing", "forward_kl, log_variance, path_kl")],
)
def test_unknown_objective(stage, known):
    with pytest.raises(UserError, match=rf"{stage}.objective=score.*{known}"):
        compose("train", ["system=double_well", "method=tabg", "budget=smoke", f"{stage}.objective=score"])


@pytest.mark.slow
def test_log_variance_gets_an_untrained_flow_out_of_clashes(tmp_path):
    """Of the untrained flow's draws nearly all clash; after a few steps on their ranks far fewer do."""
    few = [
        "hot={objective: log_variance, batch_size: 256}",
        "hot.fit={steps: 60, lr: 2.0e-3, schedule: constant, ema_decay: null}",
        "budget=smoke",
        "threads=1",
    ]
    config = compose("train", ["system=tetrapeptide", "method=tabg", *few])
    work = Workspace(RunFolder.create(tmp_path, config, config.system.name), config, make_fabric("cpu"))
    hot = work.system.at_temperature(1200.0)
    flow, generator = make_spline_flow(config, work.system), torch.Generator().manual_seed(0)

    def share_of_clashes(flow):
        return float((hot.energy(flow.sample(512, generator)[0]) > hot.typical_energy() + 46).float().mean())

    before = share_of_clashes(flow)
    tabg.train_hot(work)
    after = share_of_clashes(load_trained(flow, tmp_path / "checkpoints" / "hot.safetensors"))
    assert before > 0.95
    assert after < 0.4


def test_generator_of_a_molecule_and_of_a_plane():
    aldp = make_coordinates(bz.load_system("aldp"), OmegaConf.create(CONFIG["generator"]))
    assert isinstance(aldp, InternalCoordinates)
    assert aldp.zmatrix.root == (1, 4, 6)  # the main chain
    assert len(aldp.methyls) == 3
    for box in (None, [[-50, -50], [50, 50]]):
        with pytest.raises(UserError, match="needs a box"):
            make_coordinates(DoubleWell(), OmegaConf.create({"box": box}))
    config = OmegaConf.create(CONFIG)
    first, second = (make_spline_flow(config, DoubleWell()) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
