"""The end of a sweep: a table of every method's runs and a figure; failures told; seeds that share nothing but data."""

import csv
import json
import math

import numpy as np
import pytest
import torch

import boltznce as bz
from boltznce.analysis.main_numbers import DELTA_F, Number, free_energies, main_numbers, over_seeds
from boltznce.sweep import draw_sweep, members_of

TINY = ["system=double_well", "budget=smoke", "threads=1", "flow.fit.steps=20", "ebm.fit.steps=10"]
TINY += ["samples.n_train=256", "samples.n_validation=64", "data.n_samples=2000", "flow.n_train=1000"]
TINY += ["samples.likelihood=none", "ebm.regression_weight=0", "flow.solver.steps=4"]
TINY += ["evaluation={n_samples: 256, n_exact: 16, n_correction: 16, n_bootstrap: 20, n_torus: 50, refine: null}"]
SWEPT = ["seed=0,1", "flow.start=null,missing.safetensors", "hydra.sweep.dir=sweep"]


@pytest.fixture(scope="module")
def sweep(forks, tmp_path_factory):
    """A folder with ``sweep``, two seeds of two settings, one of which fails, and what was printed."""
    folder = tmp_path_factory.mktemp("sweep")
    return folder, forks.run("train", "-m", *TINY, *SWEPT, cwd=folder)


def rows_of(path):
    with open(path, newline="", encoding="utf-8") as handle:
        return list(csv.DictReader(handle))


def test_a_sweep_of_any_method_ends_with_a_table_and_a_figure(sweep):
    folder = sweep[0] / "sweep"
    first, second = rows_of(folder / "table.csv")
    assert (first["flow.start"], first["runs"], second["runs"], second["not finished"]) == ("null", "2", "0", "2")
    done = [member for member in members_of(folder) if member.finished]
    metrics = [json.loads((member.path / "metrics.json").read_text()) for member in done]
    ess = [next(iter(each["ess"].values()))["ess"] for each in metrics]
    assert float(first["ESS, mean"]) == pytest.approx(np.mean(ess))
    assert float(first["ESS, std"]) == pytest.approx(np.std(ess, ddof=1))
    for title in (DELTA_F, "E-W2 (kT), weighted", "W2, weighted", "flow, validation loss", "seconds"):
        assert math.isfinite(float(first[f"{title}, mean"])), title
    assert (folder / "figure.png").stat().st_size > 20_000
    runs = rows_of(folder / "runs.csv")
    assert [(run["seed"], run["state"] == "finished") for run in runs] == [("0", 1), ("0", 0), ("1", 1), ("1", 0)]


def test_failed_members_are_told_and_end_no_other(sweep):
    folder, done = sweep
    assert done.status == 2
    table = (folder / "sweep" / "table.md").read_text()
    assert table.strip() in done.output
    assert "| 0 of 2 |" in table
    assert "2 of 4 runs are not in it" in table
    assert table.count("flow.start=missing.safetensors is no file: give one of weights, or null.") == 2


def test_a_sweep_of_which_nothing_is_left_is_an_error(forks, tmp_path):
    done = forks.run("train", "-m", *TINY, "flow.start=none", "seed=0", "hydra.sweep.dir=sweep", cwd=tmp_path)
    assert done.status == 2
    assert "has no finished runs (flow.start=none is no file" in done.output


def test_seeds_share_their_data_and_nothing_else(sweep):
    folder = sweep[0]
    zero, one = (bz.load_run(member.path) for member in members_of(folder / "sweep") if member.finished)
    assert {path.name for path in (folder / "data").iterdir() if path.is_dir()} == {"double_well-smoke"}
    assert zero.config.data == one.config.data
    assert zero.folder.stages["data"]["datasets"] == one.folder.stages["data"]["datasets"]
    for file in ("checkpoints/flow.safetensors", "checkpoints/ebm.safetensors", "samples/weighted/positions.npy"):
        assert (zero.folder.path / file).read_bytes() != (one.folder.path / file).read_bytes(), file
    for leaf in (leaf for stage in one.folder.stages.values() for leaf in stage.get("leaves", {})):
        assert leaf.startswith("/") == ("double_well-smoke" in leaf)  # all else is in the run's own folder


def test_a_member_is_the_run_that_it_would_be_alone(sweep, tmp_path):
    folder, threads = sweep[0], torch.get_num_threads()
    alone = bz.train_run(tmp_path, *TINY, "seed=1", f"data_dir={folder / 'data'}").folder.path
    torch.set_num_threads(threads)
    member = next(m.path for m in members_of(folder / "sweep") if m.finished and m.words["seed"] == "1")
    for file in ("positions.npy", "log_weights.npy"):
        a, b = (np.load(path / "samples" / "weighted" / file) for path in (alone, member))
        np.testing.assert_array_equal(a, b)


def test_a_folder_without_runs(tmp_path):
    with pytest.raises(bz.UserError, match="no finished runs"):
        draw_sweep(tmp_path)


def test_means_are_of_what_is_reliable():
    rows = {"ebm": {"value": 4.0, "reliable": False}, "two_sided": {"value": 3.8, "reliable": True, "interval": [3, 5]}}
    whole = {"free_energy": rows | {"reference": {"value": 3.5}}, "headline": {"row": "two_sided"}, "weighted": "ebm"}
    assert free_energies(whole)[DELTA_F]["row"] == "two_sided"
    numbers = main_numbers(whole, {"flow": 1.5, "ebm": None})
    assert numbers[DELTA_F] == (3.8, True, [3, 5])
    assert numbers["ΔF, by weights alone (kT)"] == (4.0, False, None)
    assert numbers["error of ΔF (kT)"].value == pytest.approx(0.3)
    assert numbers["flow, validation loss"].value == 1.5
    none = main_numbers(whole | {"headline": {"row": None}}, {})
    assert none[DELTA_F] == (4.0, False, None)
    assert over_seeds([numbers[DELTA_F], none[DELTA_F]]).mean == 3.8
    assert over_seeds([none[DELTA_F], Number(5.0, False)]).mean == 4.5


def test_of_many_molecules_the_numbers_are_means():
    average = {"ess": 0.01, "abs_error": 0.4, "E-W2 (kT), refined": 0.5, "E-W2 (kT), unweighted": 20.0}
    numbers = main_numbers({"average": average, "members": {"AC": {"headline": {"row": None}}}}, {})
    assert {title: number.value for title, number in numbers.items()} == {
        "|ΔF − reference| (kT)": 0.4,
        "ESS": 0.01,
        "E-W2 (kT), refined": 0.5,
    }
