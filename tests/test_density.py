"""method=density and its sweep; and the whole line of BoltzNCE on a system in the plane."""

import csv
import json

import numpy as np
import pytest
import torch

import boltznce as bz
from boltznce.analysis.metrics import density_errors, plane_w2
from boltznce.config import compose
from boltznce.data.matching import require_samples
from boltznce.data.members import draw_dataset
from boltznce.data.simulate import simulate
from boltznce.methods.free_energy import write_free_energy


def run(folder, overrides):
    threads = torch.get_num_threads()
    bz.train_run(folder, *overrides, "threads=1", "device=cpu")
    torch.set_num_threads(threads)
    return folder


@pytest.fixture(scope="module")
def line(tmp_path_factory):
    """The folder of a finished smoke run of BoltzNCE on eight Gaussians."""
    few = ["samples={n_train: 512, n_validation: 128}", "evaluation={n_exact: 64, n_correction: 64, n_torus: 100}"]
    words = ["system=gaussians8", "budget=smoke", *few, f"data_dir={tmp_path_factory.mktemp('data')}"]
    return run(tmp_path_factory.mktemp("line"), words)


# ---- errors of a density ---------------------------------------------------------------------------------------------


def test_density_errors_of_known_densities():
    p, q = np.array([0.5, 0.3, 0.2]), np.array([0.25, 0.25, 0.5])
    errors = density_errors(np.log(p) + 3, np.log(q) - 7, np.array([0, 0, 1]), np.full(3, True))
    assert errors.forward_kl == pytest.approx((p * np.log(p / q)).sum())
    assert errors.reverse_kl == pytest.approx((q * np.log(q / p)).sum())
    assert errors.leaked_mass is None
    assert errors.mode_weight_error == pytest.approx(0.6)
    np.testing.assert_allclose(errors.mode_weights, [[0.5, 0.8], [0.5, 0.2]])


def test_leaked_mass():
    log_p, support = np.array([0.0, 0.0, -1e4]), np.array([True, True, False])
    errors = density_errors(log_p, np.log([0.4, 0.4, 0.2]), np.array([0, 1, 1]), support)
    assert errors.leaked_mass == pytest.approx(0.2)
    assert errors.reverse_kl is None
    assert errors.forward_kl == pytest.approx(-np.log(0.8))


def test_plane_w2_of_shifted_points():
    points = np.random.default_rng(0).normal(size=(300, 2))
    assert plane_w2(points, points + np.array([3.0, 4.0]), n_points=300, n_subsets=2).mean == pytest.approx(
        5.0, rel=0.02
    )


# ---- configs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", ["smoke", "cpu", "gpu", "long", "paper"])
@pytest.mark.parametrize("system", ["gaussians8", "checkerboard", "mueller_brown"])
def test_every_budget_composes_in_the_plane(system, budget):
    config = compose("train", [f"system={system}", f"budget={budget}"])
    assert (config.budget, config.data.simulation, config.flow.balance) == (budget, None, None)
    assert config.flow.model.length_scale == config.ebm.model.length_scale == config.system.length_scale
    density = compose("train", [f"system={system}", f"budget={budget}", "method=density"])
    assert (density.budget, "flow" in density) == (budget, False)


def test_the_experiment_composes():
    config = compose("train", ["experiment=boltznce/fig_toy", "objective=score", "system=checkerboard"])
    assert (config.method.name, config.system.name, config.ebm.model.objective) == ("density", "checkerboard", "score")
    with pytest.raises(bz.UserError, match="fig_toy"):
        compose("train", ["experiment=boltznce/fig_toys"])


# ---- the sweep -------------------------------------------------------------------------------------------------------


def test_the_sweep_ends_with_a_figure_and_a_table(forks, tmp_path):
    command = ["-m", "experiment=boltznce/fig_toy", "budget=smoke", "threads=1"]
    choices = [
        "objective=nce,both",
        "system=gaussians8,checkerboard",
        "seed=0,1",
        "ebm.fit.steps=3",
        "hydra.sweep.dir=sweep",
    ]
    done = forks.run("train", *command, *choices, cwd=tmp_path)
    assert done.status == 0, done.output
    with open(tmp_path / "sweep" / "table.csv", newline="", encoding="utf-8") as handle:
        table = list(csv.DictReader(handle))
    assert [(row["system"], row["objective"], row["runs"]) for row in table] == [
        ("gaussians8", "nce", "2"),
        ("gaussians8", "both", "2"),
        ("checkerboard", "nce", "2"),
        ("checkerboard", "both", "2"),
    ]
    values = [
        json.loads((tmp_path / "sweep" / "gaussians8" / "nce" / f"seed{k}" / "metrics.json").read_text())["density"][
            "forward_kl"
        ]
        for k in (0, 1)
    ]
    assert float(table[0]["KL(true ‖ learned), mean"]) == pytest.approx(np.mean(values))
    assert float(table[0]["KL(true ‖ learned), std"]) == pytest.approx(np.std(values, ddof=1))
    assert (table[0]["leaked mass, n"], table[2]["KL(learned ‖ true), n"]) == ("0", "0")
    assert (tmp_path / "sweep" / "figure.png").stat().st_size > 5000
    assert (tmp_path / "sweep" / "table.md").read_text().strip() in done.output


def test_density_needs_a_known_density(tmp_path):
    words = ["method=density", "system=aldp", "budget=smoke", "ebm.model.length_scale=1"]
    with pytest.raises(bz.UserError, match=r"no size for system=aldp \(a molecule\) .* has plane/cpu"):
        run(tmp_path, words)
    with pytest.raises(bz.UserError, match="in the plane"):
        run(tmp_path, [*words, "kind=plane"])


# ---- the whole line --------------------------------------------------------------------------------------------------


def test_the_whole_line(line):
    metrics = json.loads((line / "metrics.json").read_text())
    assert metrics["free_energy"]["reference"]["value"] == pytest.approx(0.0, abs=1e-9)
    assert {"ebm", "corrected", "exact", "unweighted"} <= set(metrics["free_energy"])
    assert metrics["modes"]["exact"] == pytest.approx([0.125] * 8, abs=1e-4)
    assert len(metrics["modes"]["flow, weighted"]) == 8
    assert metrics["distances"]["W2"]["floor"]["mean"] > 0
    assert "made" not in metrics  # there are no bonds to be right or wrong
    for name in ("plane", "energy_histograms", "profile", "learning_curves", "weights", "likelihood"):
        assert (line / "figures" / f"{name}.png").stat().st_size > 5000
    text = (line / "report.md").read_text()
    assert "Populations of the modes" in text
    assert "peptide" not in text


@pytest.mark.parametrize(
    "system", ["checkerboard", *(pytest.param(name, marks=pytest.mark.slow) for name in ("mueller_brown", "two_moons"))]
)
def test_the_line_ends_on_other_systems(tmp_path, system):
    tiny = [
        "flow.fit.steps=5",
        "ebm.fit.steps=5",
        "samples.n_train=256",
        "samples.n_validation=64",
        "evaluation.n_samples=256",
    ]
    tiny += ["evaluation={n_exact: 32, n_correction: 32, n_bootstrap: 20, n_torus: 50}", "flow.solver.steps=4"]
    tiny += [f"data_dir={tmp_path}"]
    folder = run(tmp_path / "run", [f"system={system}", "budget=smoke", *tiny])
    assert (folder / "report.md").exists()


def test_samples_of_the_line(line, tmp_path):
    run = bz.load_run(line)
    samples = run.sample(100, likelihood="exact", seed=1)
    assert samples.positions.shape == (100, 1, 2)
    np.testing.assert_allclose(samples.log_weights, -samples.energy - samples.log_prob)
    folder = tmp_path / "samples"
    samples.save(folder)
    np.testing.assert_array_equal(bz.WeightedSamples.load(folder).positions, samples.positions)
    angle = run.system.coordinate(samples.positions, "angle")
    assert np.isfinite(
        bz.free_energy_difference(angle, samples.log_weights, run.system.state.interval, n_bootstrap=20).value
    )


@pytest.mark.parametrize(("coordinate", "state", "words"), [(None, None, "< angle <"), ("x", (0.0, np.inf), "x > 0")])
def test_free_energy_of_saved_samples(line, tmp_path, coordinate, state, words):
    system = bz.load_run(line).system
    write_free_energy(
        system, line / "samples" / "weighted", tmp_path, coordinate=coordinate, state=state, n_bootstrap=20
    )
    assert words in (tmp_path / "report.md").read_text()
    assert len(json.loads((tmp_path / "profile.json").read_text())["free_energy"]) == 72
    assert (tmp_path / "figures" / "profile.png").exists()


@pytest.mark.parametrize(("name", "other"), [("gaussians8", {"std": 0.2}), ("double_well", {}), ("aldp", {})])
def test_samples_of_another_system_give_no_free_energy(line, tmp_path, name, other):
    with pytest.raises(bz.UserError, match=rf"{line}.* holds samples of another system"):
        write_free_energy(bz.load_system(name, **other), line / "samples" / "weighted", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_samples_of_another_temperature_or_hand_give_no_free_energy(tmp_path):
    system = bz.load_system("aldp")
    x = system.positions + 0.002 * torch.randn(40, 22, 3, generator=torch.Generator().manual_seed(0))
    for positions, at, told in ((x, 310.0, "at 310 K"), (-x, 300.0, "handedness"), (x, 300.0, "")):
        energy = bz.load_system("aldp", temperature=at).energy(positions).double().numpy()
        energy[0], meta = np.inf, {"system": "aldp"}
        bz.WeightedSamples(positions.numpy(), energy, np.zeros(40), meta=meta).save(tmp_path / "samples")
        if told:
            with pytest.raises(bz.UserError, match=told):
                write_free_energy(system, tmp_path / "samples", tmp_path / "out", n_bootstrap=5)
        else:
            require_samples(tmp_path, bz.WeightedSamples.load(tmp_path / "samples"), system)


def test_data_of_other_settings_are_refused(line, tmp_path):
    data = bz.load_run(line).config.data.folder
    with pytest.raises(bz.UserError, match="another system"):
        run(tmp_path, ["system=gaussians8", "system.std=0.2", "budget=smoke", f"data.folder={data}"])


def test_exact_data_are_those_of_the_seed(tmp_path):
    system = bz.load_system("double_well")
    first, again, other = (draw_dataset(system, tmp_path / str(k), 100, seed) for k, seed in enumerate((0, 0, 1)))
    np.testing.assert_array_equal(first.positions, again.positions)
    assert not np.array_equal(first.positions, other.positions)
    np.testing.assert_allclose(
        first.energies, system.energy(torch.from_numpy(np.array(first.positions))).numpy(), rtol=1e-5, atol=1e-5
    )
    with pytest.raises(bz.UserError, match="exactly"):
        draw_dataset(bz.load_system("aldp"), tmp_path / "aldp", 10)


def test_there_is_nothing_to_simulate(tmp_path):
    with pytest.raises(bz.UserError, match="nothing to simulate in gaussians8"):
        simulate(bz.load_system("gaussians8"), tmp_path / "data", duration=1.0)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_truth_lies_in_the_interval_as_often_as_it_says(tmp_path):
    """Twenty short runs: the exact ΔF in at least 17 of the 95% intervals, weighted populations within 0.01."""
    short = [
        "flow.fit.steps=800",
        "ebm.fit.steps=600",
        "samples.n_train=8192",
        "evaluation.n_bootstrap=400",
        "evaluation.n_torus=500",
    ]
    inside, errors = {"ebm": 0, "corrected": 0}, []
    for seed in range(20):
        folder = run(
            tmp_path / str(seed),
            ["system=gaussians8", "budget=cpu", f"seed={seed}", f"data_dir={tmp_path / 'data'}", *short],
        )
        metrics = json.loads((folder / "metrics.json").read_text())
        exact = metrics["free_energy"]["reference"]["value"]
        for key in inside:
            low, high = metrics["free_energy"][key]["interval"]
            inside[key] += low <= exact <= high
        weights = (np.array(metrics["modes"][key]) for key in ("exact", "flow, weighted"))
        errors.append(float(np.abs(np.subtract(*weights)).max()))
        corrected = metrics["free_energy"]["corrected"]
        print(seed, corrected["value"], corrected["interval"], corrected["reliable"], errors[-1], flush=True)
    assert inside["corrected"] >= 17, inside
    assert max(errors) <= 0.01, errors
