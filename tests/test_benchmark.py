"""The benchmark's rows, table and figure on a small case, and its mistakes."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from known import EBM_ERROR, REST, STATE, TARGET, RoundModels, nearest, springs
from test_known_answers import ROUND_WORDS

from boltznce.analysis.reweighting import WeightedSamples
from boltznce.benchmarks import free_energy
from boltznce.benchmarks.energy import energy_figure, energy_table, measure_energy
from boltznce.benchmarks.finished import open_finished
from boltznce.benchmarks.free_energy import free_energy_figure, free_energy_table, measure_free_energy, seconds_to
from boltznce.benchmarks.likelihood import likelihood_figure, likelihood_rows, likelihood_table, measure_likelihood
from boltznce.benchmarks.network import measure_network, network_figure, network_table
from boltznce.benchmarks.spline import measure_spline, spline_figure, spline_table
from boltznce.benchmarks.timing import time_call
from boltznce.config import compose
from boltznce.errors import UserError
from boltznce.flows.solvers import SolverSettings


def test_rows_hold_quartiles_for_every_case():
    rows = measure_energy(
        {"aldp": {"system": "aldp"}, "AA": {"system": "AA"}}, [2, 8], ["torch", "openmm"], min_seconds=0.01
    )
    assert len(rows) == 2 * 2 * 2 * 2
    assert all(0 < row["low"] <= row["median"] <= row["high"] for row in rows)
    assert {row["n_atoms"] for row in rows} == {22, 23}
    table = energy_table(rows)
    assert table.count("\n| aldp") == 4
    assert "time grows as atoms^" in table
    assert len(energy_figure(rows).axes) == 2


def test_spline_rows_table_and_figure():
    flows = {"small": {"depth": 1, "width": 8, "n_pairs": 1}}
    rows = measure_spline(["aldp"], flows, ["eager"], batch_size=8, temperature=1200.0, min_seconds=0.01)
    assert [row["kind"] for row in rows] == [
        "sample + log q",
        "log q",
        "step of reverse KL",
        "step of log-variance",
        "step of path KL",
    ]
    assert all(0 < row["low"] <= row["median"] <= row["high"] for row in rows)
    assert "| aldp | 60 | small | eager |" in spline_table(rows)
    assert len(spline_figure(rows).axes) == 5


def test_network_rows_tell_what_padding_costs():
    networks = {
        "egnn": {"_target_": "boltznce.networks.egnn.EGNNVectorField", "n_layers": 1, "width": 8},
        "ebm": {
            "_target_": "boltznce.networks.graphormer.GraphormerEnergy",
            **{"n_layers": 1, "width": 8, "ffn_width": 8, "n_heads": 2, "n_kernels": 4, "n_types": 54},
        },
    }
    family = {"system": "dipeptides", "selection": "mine", "selections": {"mine": {"train": ["AG", "GS", "SA"]}}}
    rows = measure_network(family, networks, batch_size=4, max_padding=0.3, min_seconds=0.0)
    assert [(row["network"], row["kind"]) for row in rows] == [
        (n, k) for n in ("egnn", "ebm") for k in ("forward", "training step")
    ]
    for row in rows:
        assert set(row["by_size"]) == {"20", "21", "24"}
        assert 0 < row["padding"] < 0.3
        assert row["cost"] == pytest.approx(row["padded_ms"] / row["equal_ms"] - 1)
    assert "| egnn |" in network_table(rows)
    assert len(network_figure(rows).axes) == 2


def test_the_first_call_does_not_count():
    calls = []
    timing = time_call(lambda: calls.append(1), min_seconds=0.0, min_repeats=3)
    assert timing.repeats == 3
    assert len(calls) == 4
    assert timing.per(10)["median"] == pytest.approx(1e5 * timing.median)


def test_unknown_backend_is_named():
    with pytest.raises(UserError, match=r"'gpu'.*torch, compiled, openmm"):
        measure_energy({"aldp": {"system": "aldp"}}, [1], ["gpu"])


def test_script_leaves_table_numbers_and_figure(forks, tmp_path):
    others = [f"~energy.molecules.{name}" for name in ("tetrapeptide", "hexapeptide", "decapeptide")]
    settings = [
        *others,
        "energy.batch_sizes=[2]",
        "energy.backends=[torch,openmm]",
        "min_seconds=0.01",
        "output=benchmark",
    ]
    done = forks.run("benchmark", "what=energy", *settings, cwd=tmp_path)
    assert done.status == 0, done.output
    output = tmp_path / "benchmark"
    result = json.loads((output / "energy.json").read_text())
    assert result["machine"]["threads"] >= 1
    assert len(result["rows"]) == 4
    assert (output / "energy.md").exists()
    assert (output / "energy.png").exists()


# ---- of a run -------------------------------------------------------------------------------------------------------

REFINE = "evaluation.refine={n_walkers: 1, max_steps: 10, n_moves: 1, final_moves: 1, step_size: 0.0003}"
FINE, COARSE = {"method": "heun", "steps": 6}, {"method": "heun", "steps": 2}
UMBRELLA = {"method": "umbrella", "n_repeats": 1, "n_windows": 12, "duration": 6.0, "frame_interval": 0.5}
UMBRELLA |= {"equilibration": 1.0, "segment_length": 2.0}


def round_generator(with_ebm=True):
    return RoundModels(compose("train", [*ROUND_WORDS, REFINE]), with_ebm=with_ebm).of(springs())


def round_draws(generator, n, seed=0):
    batch = generator.draw(20 * (-(-n // 18)), generator.default_likelihood, torch.Generator().manual_seed(seed))
    return WeightedSamples(*(each.numpy()[:n] for each in (batch.positions, batch.energy, batch.log_prob)))


def of_rounds(generator, n_walkers=16):
    coarse, draws = SolverSettings(**COARSE), round_draws(generator, 180)
    given = {"n_probes": [1], "n": 90, "n_walkers": n_walkers}
    return draws, likelihood_rows(generator, draws, [coarse], SolverSettings(**FINE), coarse, **given)


def test_errors_of_likelihoods_are_those_that_are_known():
    draws, rows = of_rounds(round_generator())
    assert [row["kind"] for row in rows] == ["exact", "exact", "Hutchinson", "EBM", "refinement"]
    assert all(row["ms"] > 0 for row in rows)
    assert [(row["mean"], row["std"]) for row in rows[1:3]] == [
        (0.0, 0.0)
    ] * 2  # this flow's likelihood needs no solver
    chosen = nearest(draws.positions[np.random.default_rng(0).permutation(180)[:90]])
    assert rows[3]["mean"] is None
    assert rows[3]["std"] == pytest.approx(EBM_ERROR[chosen].std(ddof=1), abs=1e-6)
    assert rows[4]["likelihood"] == "refinement of 16"
    assert (rows[4]["mean"], rows[4]["std"]) == (None, None)
    assert likelihood_table(rows).count("\n| ") == 5
    assert len(likelihood_figure(rows).axes) == 1


def test_a_run_without_an_ebm_has_the_other_likelihoods():
    _, rows = of_rounds(round_generator(with_ebm=False))
    assert [row["kind"] for row in rows if "ms" in row] == ["exact", "exact", "Hutchinson"]
    assert "- No EBM: this run has no EBM" in likelihood_table(rows)
    assert "method=boltznce" in rows[-1]["message"]
    assert likelihood_figure(rows).axes


def test_likelihoods_of_a_run(tiny_run):
    given = {"n": 4, "finest": FINE, "hutchinson": COARSE, "n_probes": [2], "n_walkers": 4}
    rows = measure_likelihood(str(tiny_run), {"fine": FINE, "coarse": COARSE}, **given)
    errors = {row["likelihood"]: row["std"] for row in rows}
    assert errors["heun 6"] == 0.0
    assert 0 < errors["heun 2"]
    assert 0 < errors["Hutchinson, 2 probes, heun 2"]
    assert 0 < errors["EBM"]
    assert rows[-1]["ms"] > 0


def test_seconds_to_an_error_leave_what_is_fixed_as_it_is():
    row = {"spent": 100.0, "fixed": 40.0, "std_error": 0.2}
    assert seconds_to(row) == pytest.approx(40.0 + 4 * 60.0)
    assert seconds_to(row, 0.4) == pytest.approx(40.0 + 60.0 / 4)
    assert seconds_to(row | {"fixed": 0.0, "std_error": 0.05}) == pytest.approx(25.0)


def test_free_energies_of_a_flow_whose_ebm_errs_by_state():
    """By 0.7 in the state and by -0.3 in the rest: all but the exact likelihoods are off by 1 kT, and told so."""
    generator, n = round_generator(), 1800
    stages = {"data": {"cpu_seconds": 1.0, "simulation_seconds": 5.0}, "flow": {"cpu_seconds": 30.0}, "evaluation": {}}

    def sample(n, seed):
        return round_draws(generator, n, seed)

    run = SimpleNamespace(system=generator.system, sample=sample, folder=SimpleNamespace(stages=stages))
    by_ebm, refined, corrected = free_energy._learned(run, generator, n, 900, 200, 0)
    exact = math.log(TARGET[REST] / TARGET[STATE])
    error = EBM_ERROR[STATE] - EBM_ERROR[REST]
    assert by_ebm["value"] == pytest.approx(exact + error, abs=0.15)
    assert refined["value"] == pytest.approx(exact + error, abs=0.3)
    assert corrected["value"] == pytest.approx(exact, abs=0.3)
    assert [row["reliable"] for row in (by_ebm, refined, corrected)] == [False, False, True]
    assert "the EBM is off by" in by_ebm["message"]
    assert {row["training"] for row in (by_ebm, refined, corrected)} == {35.0}
    assert by_ebm["spent"] / 2 < refined["spent"] < corrected["spent"]
    rows = [row | {"off": None, "off_error": None} for row in (by_ebm, refined, corrected)]
    table = free_energy_table([*rows, {"way": "by boat", "message": "left out"}])
    assert table.count("| not reliable | not reliable |") == 2
    assert "- by boat: left out" in table
    assert f"| {seconds_to(corrected):.0f} | {seconds_to(corrected) + 35.0:.0f} |" in table
    assert len(free_energy_figure(rows).axes) == 1


@pytest.mark.slow
def test_free_energies_of_a_run(tiny_run, monkeypatch):
    monkeypatch.setattr(free_energy, "wants_compiling", lambda mode: False)
    simulations = {
        "by_OpenMM": UMBRELLA | {"engine": "openmm"},
        "torch": UMBRELLA | {"engine": "torch", "compile": True},
    }
    rows = measure_free_energy(str(tiny_run), simulations, n_draws=256, n_walkers=64, n_correction=4)
    ways = ["by OpenMM", "torch", "flow + EBM weights", "refined", "refined, corrected by exact likelihoods"]
    assert [row["way"] for row in rows] == ways
    openmm, torch_engine, *learned = rows
    assert openmm["fixed"] == pytest.approx(openmm["spent"] / 7.0)  # a ps of the equilibration, six of frames
    assert openmm["off"] == pytest.approx(openmm["value"] - 3.84, abs=0.01)
    assert openmm["training"] == 0.0
    assert torch_engine == {"way": "torch", "message": free_energy.NO_COMPILER, "off": None, "off_error": None}
    assert all(row["spent"] > 0 and row["training"] > 0 for row in learned)
    assert "- torch: left out" in free_energy_table(rows)


def test_what_cannot_be_measured_is_told(tiny_run):
    with pytest.raises(UserError, match="what=likelihood measures a finished run: set run="):
        open_finished(None, "likelihood", "cpu")
    with pytest.raises(UserError, match="method"):
        measure_likelihood(str(tiny_run), {"x": {"method": "euler"}}, **likelihood_settings())
    with pytest.raises(UserError, match="There is no setting order of the solver x"):
        measure_likelihood(str(tiny_run), {"x": {"order": 2}}, **likelihood_settings())
    with pytest.raises(UserError, match="There is no setting foo of the simulation x"):
        measure_free_energy(str(tiny_run), {"x": {"foo": 1}}, n_draws=1, n_walkers=1, n_correction=1)
    simulations = {"x": {"method": "metadynamics", "engine": "openmm"}}
    with pytest.raises(UserError, match="engine=torch, or other sampling"):
        measure_free_energy(str(tiny_run), simulations, n_draws=1, n_walkers=1, n_correction=1)


def likelihood_settings():
    return {"n": 4, "finest": FINE, "hutchinson": COARSE, "n_probes": [], "n_walkers": 4}


def test_an_unfinished_run_is_told(tiny_run, monkeypatch):
    monkeypatch.setattr("boltznce.run_folder.RunFolder.stage_done", lambda self, name: name != "evaluation")
    with pytest.raises(UserError, match="finish it with boltznce train resume="):
        open_finished(str(tiny_run), "free_energy", "cpu")


@pytest.mark.slow
def test_script_measures_a_run(forks, tiny_run, tmp_path):
    small = ["likelihood.n=4", "likelihood.n_walkers=4", "likelihood.finest.steps=2", "likelihood.n_probes=[1]"]
    others = [name for name in compose("benchmark", []).likelihood.solvers if name != "heun12"]
    solvers = [f"~likelihood.solvers.{name}" for name in others]
    done = forks.run("benchmark", "what=likelihood", f"run={tiny_run}", *small, *solvers, "output=out", cwd=tmp_path)
    assert done.status == 0, done.output
    rows = json.loads((tmp_path / "out" / "likelihood.json").read_text())["rows"]
    assert [row["kind"] for row in rows] == ["exact", "exact", "Hutchinson", "EBM", "refinement"]
    done = forks.run("benchmark", "what=free_energy", cwd=tmp_path)
    assert done.status == 2
    assert "set run= to its folder" in done.output
