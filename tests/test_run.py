"""A whole run, from data to report, and what a user does with it."""

import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import boltznce as bz
from boltznce.config import compose
from boltznce.data.dataset import Dataset
from boltznce.flows.solvers import SolverSettings
from boltznce.methods import findings
from boltznce.methods.boltznce import STAGES
from boltznce.methods.models import FlowGenerator, make
from boltznce.methods.workspace import Workspace, make_fabric
from boltznce.run import RunFolder, train


def test_a_run_leaves_its_report_figures_and_samples(tiny_run):
    metrics = json.loads((tiny_run / "metrics.json").read_text())
    assert metrics["timing"]["exact_per_sample"] > metrics["timing"]["ebm_per_sample"]
    assert {"ebm", "two_sided", "corrected", "exact", "unweighted"} <= set(metrics["free_energy"])
    assert "T-W2 (rad)" in metrics["distances"]
    for name in ("ramachandran", "energy_histograms", "profile", "learning_curves", "weights", "likelihood"):
        assert (tiny_run / "figures" / f"{name}.png").stat().st_size > 5000
    assert "Free-energy difference" in (tiny_run / "report.md").read_text()
    assert all(record["finished"] for record in bz.load_run(tiny_run).folder.stages.values())


def test_samples_of_a_loaded_run(tiny_run):
    run = bz.load_run(tiny_run)
    samples = run.sample(50, likelihood="ebm", seed=3)
    assert samples.positions.shape == (50, 22, 3)
    np.testing.assert_allclose(samples.log_weights, -samples.energy - samples.log_prob)
    energy = run.system.energy(torch.from_numpy(samples.positions)).numpy()
    np.testing.assert_allclose(samples.energy, energy, rtol=1e-4, atol=1e-2)
    assert (run.system.chirality(samples.positions) > 0).all()
    np.testing.assert_array_equal(run.sample(50, likelihood="none", seed=3).positions, samples.positions)
    assert np.isnan(run.sample(4, likelihood="none").log_prob).all()


def test_likelihoods_along_the_path_and_of_given_positions_agree(tiny_run):
    flow = bz.load_run(tiny_run).generator().flow
    fine = SolverSettings("rk4", steps=12)
    x, log_q = flow.sample(4, torch.Generator().manual_seed(0), solver=fine, likelihood="exact")
    assert (flow.log_prob(x, solver=fine) - log_q).abs().max() < 0.2


def test_sampling_to_a_folder_goes_on_after_an_interruption(tiny_run, tmp_path, monkeypatch):
    run = bz.load_run(tiny_run)
    whole = run.sample(90, batch_size=32, folder=tmp_path / "whole")
    draw, calls = FlowGenerator.draw, []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return draw(*args, **kwargs)

    monkeypatch.setattr(FlowGenerator, "draw", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run.sample(90, batch_size=32, folder=tmp_path / "cut")
    assert not (tmp_path / "cut").exists()
    monkeypatch.setattr(FlowGenerator, "draw", draw)
    resumed = run.sample(90, batch_size=32, folder=tmp_path / "cut")
    np.testing.assert_array_equal(whole.positions, resumed.positions)
    assert resumed.meta["counts"] == whole.meta["counts"] == run.sample(90, batch_size=32).meta["counts"]
    assert whole.meta["counts"]["right_chirality"] >= 90


def test_scripts_sample_and_free_energy(forks, tiny_run, tmp_path):
    given = [f"run={tiny_run}", "n_samples=64", "format=dcd", f"output={tmp_path / 'samples'}"]
    done = forks.run("sample", *given, cwd=tmp_path)
    assert done.status == 0, done.output
    assert (tmp_path / "samples" / "trajectory.dcd").exists()
    given = [f"samples={tmp_path / 'samples'}", f"output={tmp_path / 'fe'}", "n_bootstrap=50"]
    done = forks.run("free_energy", f"run={tiny_run}", *given, cwd=tmp_path)
    assert done.status == 0, done.output
    assert (tmp_path / "fe" / "figures" / "profile.png").exists()
    assert "ΔF" in done.output


def test_a_repeated_sample_is_there_and_another_is_refused(tiny_run, tmp_path):
    run = bz.load_run(tiny_run)
    first = run.sample(8, likelihood="none", folder=tmp_path / "samples")
    written = (tmp_path / "samples" / "meta.yaml").stat().st_mtime_ns
    again = run.sample(8, likelihood="none", folder=tmp_path / "samples")
    np.testing.assert_array_equal(first.positions, again.positions)
    for other in ({"n": 9}, {"n": 8, "seed": 1}, {"n": 8, "format": "dcd"}):
        with pytest.raises(bz.UserError, match="holds other samples"):
            run.sample(**other, likelihood="none", folder=tmp_path / "samples")
    assert (tmp_path / "samples" / "meta.yaml").stat().st_mtime_ns == written
    for wrong in ({"n": -1}, {"n": 8, "n_probes": 0}, {"n": 8, "batch_size": 0}, {"n": 8, "format": "pdb"}):
        with pytest.raises(bz.UserError, match=list(wrong)[-1]):
            run.sample(**wrong)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("train", ["system=nope"], "aldp"),
        ("train", ["method=magic"], "boltznce"),
        ("train", ["budget=huge"], "smoke"),
        ("train", ["resume=/does/not/exist"], "run folder"),
        ("sample", ["run=/does/not/exist"], "no folder /does/not/exist"),
    ],
)
def test_mistakes_are_one_sentence(forks, tmp_path, name, arguments, message):
    done = forks.run(name, *arguments, cwd=tmp_path)
    assert done.status == 2
    assert message in done.output
    assert len(done.told) == len(done.output.strip().splitlines()) == 1


def test_likelihood_ebm_of_a_run_without_one(tiny_run, tmp_path):
    shutil.copytree(tiny_run, tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "ebm.safetensors").unlink()
    with pytest.raises(bz.UserError, match="EBM"):
        bz.load_run(tmp_path / "run").sample(4, likelihood="ebm")
    with pytest.raises(bz.UserError, match="hutchinson"):
        bz.load_run(tmp_path / "run").sample(4, likelihood="guess")


def test_a_run_of_another_system_is_refused(forks, tiny_run, tmp_path):
    done = forks.run("train", f"resume={tiny_run}", "system=aldp_amber96", cwd=tmp_path)
    assert done.status == 2
    assert "another system" in done.output


def test_data_of_another_system_are_refused(tiny_overrides, tiny_run, tmp_path):
    data = bz.load_run(tiny_run).config.data.folder
    config = compose("train", [*tiny_overrides, "system=aldp_amber96", f"data.folder={data}"])
    with pytest.raises(bz.UserError, match="another system"):
        train(RunFolder.create(tmp_path, config, config.system.name))


@pytest.mark.slow
def test_a_run_whose_data_are_gone_or_others_costs_the_comparison(tiny_run, tmp_path):
    """The report is written without it, and says so."""
    shutil.copytree(tiny_run, tmp_path / "run")
    folder = RunFolder.open(tmp_path / "run", trust=True)
    config = folder.config
    data, config.data.folder = config.data.folder, str(tmp_path / "data")
    for words in ("are no longer in", "no longer holds the data of aldp"):
        STAGES["report"](Workspace(folder, config, make_fabric("cpu")))
        assert words in (tmp_path / "run" / "report.md").read_text()
        metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
        assert "md" not in metrics
        assert metrics["settings"]["energy"] == "amber99sbildn.xml + amber99_obc.xml + NoCutoff"
        frames = Dataset.load(data)
        meta = {key: frames.meta[key] for key in ("system", "settings")}
        Dataset.write(tmp_path / "data", np.array(frames.positions), frames.energies, meta=meta)


def test_data_that_are_all_other_isomers_are_compared_with_none(tiny_run, monkeypatch, caplog):
    work = bz.load_run(tiny_run)._work
    everything = lambda system, x: {"cis peptide bond": np.ones(len(x), dtype=bool)}  # noqa: E731
    monkeypatch.setattr(findings, "excluded_conformers", everything)
    data, notes = findings.held_out_data(work, work.system, work.system)
    assert (data, notes) == (None, ())
    assert "other isomers" in caplog.text


def test_paper_setting_composes_and_takes_a_step(tiny_run, tmp_path):
    """The published networks at full size, on real frames."""
    config = compose("train", ["budget=paper"])
    run = bz.load_run(tiny_run)
    x = torch.from_numpy(np.array(Dataset.load(Path(run.config.data.folder)).positions[:8]))
    flow, ebm = (make(config, run.system, name).train().of(run.system) for name in ("flow", "ebm"))
    for loss in (flow.loss(x), ebm.loss(x)["loss"]):
        assert loss.isfinite()
        loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in [*flow.parameters(), *ebm.parameters()])
    assert sum(p.numel() for p in flow.parameters()) == 103_412


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["data", "flow", "ebm"])
def test_killed_in_any_phase_and_resumed_gives_the_same_weights(forks, tiny_run, tiny_overrides, tmp_path, phase):
    folder, data = tmp_path / "run", tmp_path / "data"
    overrides = [word for word in tiny_overrides if not word.startswith("data_dir=")]
    overrides += [f"data_dir={data}", f"hydra.run.dir={folder}"]
    overrides += ["flow.fit.checkpoint_every=10", "ebm.fit.checkpoint_every=5"]
    child = forks.start("train", *overrides, cwd=tmp_path)
    sign = {
        "data": lambda: any((data / "aldp-smoke.unfinished").glob("*/state.npz")),
        "flow": lambda: any(folder.glob("checkpoints/flow/step_*")),
        "ebm": lambda: any(folder.glob("checkpoints/ebm/step_*")),
    }[phase]
    deadline = time.time() + 300
    while not sign():
        assert child.poll() is None, f"ended before it could be killed: {child.output}"
        assert time.time() < deadline
        time.sleep(0.05)
    child.kill()
    child.wait()
    assert not (folder / "report.md").exists()
    done = forks.run("train", f"resume={folder}", cwd=tmp_path)
    assert done.status == 0, done.output
    for name in ("flow", "ebm"):
        ours, theirs = (load_file(f / "checkpoints" / f"{name}.safetensors") for f in (folder, tiny_run))
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
