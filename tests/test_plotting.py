"""Figures: what is left out for want of samples, what curves have in common, styles, and curves of a run that goes."""

import time

import matplotlib
import numpy as np
import pytest
from runs import run_in

from boltznce.analysis import plotting
from boltznce.analysis.profiles import FreeEnergyProfile, free_energy_profile
from boltznce.errors import UserError
from boltznce.logger import TensorBoardLogger
from boltznce.methods import live

EDGES = (np.linspace(0.0, 1.0, 13), np.linspace(0.0, 1.0, 13))


def uniform(n, seed=0):
    return np.random.default_rng(seed).random((n, 2))


def test_a_surface_of_equal_weights_is_that_of_none():
    points = uniform(300)
    none, equal = (plotting._surface((points, given), EDGES, 5.0) for given in (None, np.full(300, 2.0)))
    np.testing.assert_array_equal(none, equal)
    assert np.exp(-none[np.isfinite(none)]).sum() == pytest.approx(1.0)


def test_bins_of_few_effective_samples_are_left_out_or_joined():
    points, log_weights = uniform(20_000), np.random.default_rng(1).normal(0.0, 0.1, 20_000)
    fine = plotting._surface((points, log_weights), EDGES, 5.0)
    assert np.isfinite(fine).all()
    assert np.exp(-fine).sum() == pytest.approx(1.0)
    few = plotting._surface((points[:500], log_weights[:500]), EDGES, 5.0)
    assert len(np.unique(few)) <= 36  # joined by two and two
    assert np.exp(-few[np.isfinite(few)]).sum() == pytest.approx(1.0, abs=0.1)
    one = np.where(np.arange(500) == 0, 20.0, 0.0)  # has all the weight
    surface = plotting._surface((points[:500], one), EDGES, 5.0)
    assert np.isnan(surface[tuple((12 * points[0]).astype(int))])
    assert np.nanmin(surface) > 15
    figure = plotting.plot_plane({"exact": (points, None), "weighted": (points[:3], one[:3])}, ((0, 1), (0, 1)), 12)
    assert "effective samples" in figure.axes[1].texts[0].get_text()


def test_profiles_have_the_probability_outside_of_the_state_in_common():
    generator = np.random.default_rng(0)
    rest, state = generator.normal(-1.5, 0.3, 20_000), generator.normal(1.0, 0.2, 1_000)
    truth = free_energy_profile(np.concatenate([rest, state]), n_bins=40)
    other = free_energy_profile(np.concatenate([rest, np.tile(state, 20)]), n_bins=40)  # another share of the state
    noisy = FreeEnergyProfile(other.centres, other.free_energy - np.nanmin(other.free_energy) + 7.0, other.std_error)
    figure = plotting.plot_profiles({"other": noisy}, truth)
    black, drawn = (line.get_ydata() for line in figure.axes[0].get_lines())
    outside = np.isfinite(black) & np.isfinite(drawn) & (truth.centres < -1.0)
    assert outside.sum() > 5
    np.testing.assert_allclose(drawn[outside], black[outside], atol=1e-6)
    assert figure.axes[0].get_ylim()[0] < np.nanmin(drawn) < -0.3  # seen whole


def test_a_style_of_ones_own(tmp_path):
    style = tmp_path / "mine.mplstyle"
    style.write_text("axes.labelsize: 17\n")
    before = dict(matplotlib.rcParams)
    with plotting.style(style):
        figure = plotting.plot_weights({"a": np.zeros(10)})
    assert figure.axes[0].xaxis.label.get_size() == 17
    assert plotting.plot_weights({"a": np.zeros(10)}).axes[0].xaxis.label.get_size() == 9
    assert dict(matplotlib.rcParams) == before
    with pytest.raises(UserError, match=r"figures\.style=nowhere is no style of matplotlib"), plotting.style("nowhere"):
        pass


def test_a_style_that_there_is_not_is_told_before_a_run(tmp_path):
    with pytest.raises(UserError, match=r"figures\.style=nowhere is no style of matplotlib"):
        run_in(tmp_path / "run", ["system=gaussians8", "budget=smoke", "figures.style=nowhere"])
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_style_may_say_what_is_matplotlibs_default(tmp_path):
    (tmp_path / "mine.mplstyle").write_text("axes.labelsize: medium\nfont.size: 10\n")
    with plotting.style(tmp_path / "mine.mplstyle"):
        assert plotting.plot_weights({"a": np.zeros(10)}).axes[0].xaxis.label.get_size() == 10


def test_the_step_that_was_kept_is_marked():
    curves = {"flow loss/validation": ([1, 2, 3], [3.0, 1.0, 2.0]), "EBM/validation": ([1, 2], [1.0, 2.0])}
    first, second = plotting.plot_learning_curves(curves, kept={"flow loss": 2.0}).axes
    assert "kept: step 2" in [line.get_label() for line in first.get_lines()]
    assert [line.get_label() for line in second.get_lines()] == ["validation"]


class Recorder:
    """A logger that keeps what it is told."""

    def __init__(self):
        self.told, self.closed = {}, False

    def log(self, values):
        pass

    def summarize(self, values, figures):
        self.told = {"values": values, "figures": [path.name for path in figures if path.exists()]}

    def close(self):
        self.closed = True


def test_a_run_leaves_figures_as_asked_and_tells_its_logger(tmp_path, monkeypatch):
    recorder = Recorder()
    monkeypatch.setattr("boltznce.run.open_logger", lambda *args, **kwargs: recorder)
    few = ["hot.fit.steps=2", "annealing.n_steps=1", "annealing.fit.steps=2", "annealing.n_draws=200"]
    few += ["evaluation={n_samples: 200, n_ladder: 100, n_reference: 200, n_bootstrap: 20, n_torus: 50}"]
    words = ["system=gaussians8", "method=tabg", "budget=smoke", "threads=1", "figures.also=[svg]", *few]
    metrics = run_in(tmp_path / "run", words)
    names = {path.name for path in (tmp_path / "run" / "figures").iterdir()}
    assert {name.replace(".png", ".svg") for name in names if name.endswith(".png")} <= names
    assert {"plane.png", "profile.png"} <= set(recorder.told["figures"])
    assert recorder.told["values"]["ESS"] == pytest.approx(metrics["ess"]["exact weights"]["ess"])
    assert recorder.closed


def test_curves_of_a_run_that_goes(tmp_path, monkeypatch):
    (tmp_path / "flow.csv").write_text(
        "step,seconds,train/loss,train/grad_norm,validation/loss\n1,0,2,9,\n2,1,1,9,1.5\n"
    )
    redraw, figure = live.live_curves(tmp_path, "flow"), tmp_path / "figures" / "learning_curves.png"
    redraw()
    assert not figure.exists()  # not so soon
    monkeypatch.setattr(live, "EVERY", 0.0)
    time.sleep(0.01)
    redraw()
    assert figure.exists()


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    logger = TensorBoardLogger(tmp_path)
    logger.log({"flow/step": 3, "flow/train/loss": 0.5})
    plotting.plot_weights({"a": np.zeros(10)}).savefig(tmp_path / "weights.png")
    logger.summarize({"ESS": 0.1}, [tmp_path / "weights.png"])
    logger.close()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("flow/train/loss")] == [(3, 0.5)]
    assert events.Scalars("report/ESS")[0].value == pytest.approx(0.1)
    assert events.Tags()["images"] == ["figures/weights"]
