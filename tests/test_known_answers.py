"""Stages, evaluation and report on systems and generators of which every number is known: what wires the formulas.

``tests/mutants.py`` makes deliberate bugs of wiring again, one by one; all must fail here.
"""

import json
import math
from types import SimpleNamespace

import mdtraj
import numpy as np
import openmm
import pytest
import torch
from known import (
    CIS_REST,
    CIS_STATE,
    DRAWN,
    EBM_CONSTANT,
    EBM_ERROR,
    REST,
    SPREAD,
    STATE,
    TARGET,
    GaussianFlow,
    RoundModels,
    Spring,
    aldp,
    conformers,
    log_mixture,
    nearest,
    simulated,
    springs,
)
from openmm import app
from scipy.stats import norm, vonmises
from test_simulate import KT, VonMisesWindows

from boltznce.analysis.free_energy import corrected_free_energy_difference, free_energy_difference
from boltznce.analysis.reweighting import WeightedSamples
from boltznce.annealing import fill_buffer
from boltznce.checkpoint import save_weights
from boltznce.config import compose
from boltznce.data import simulate
from boltznce.data.engine import Job, frame_dtype
from boltznce.data.reference import result_of
from boltznce.ebm import EnergyBasedModel
from boltznce.methods import boltznce, ladder, report, spline_models, stages, tabg
from boltznce.methods.evaluation import evaluate
from boltznce.methods.models import load_trained, solver_settings, weights_path
from boltznce.methods.workspace import Workspace, make_fabric
from boltznce.run import load_run, train
from boltznce.run_folder import RunFolder
from boltznce.states import State
from boltznce.systems.bond_graph import BondGraph, GraphCheck
from boltznce.systems.isomers import allowed_conformers, excluded_conformers


def workspace(folder, words, system=None, models=None):
    """A workspace in ``folder`` of a composed config; with fakes in place of its system and its trained models."""
    config = compose("train", [*words, f"data_dir={folder}", "threads=1", "device=cpu"])
    work = Workspace(RunFolder.create(folder / "run", config, config.system.name), config, make_fabric("cpu"))
    if system is not None:
        work.__dict__["system"] = system
    if models is not None:
        work.__dict__["models"] = models(config)
    return work


def arrays(folder):
    """What is in a folder of samples, as it is on disk."""
    return SimpleNamespace(**{path.stem: np.load(path) for path in folder.glob("*.npy")})


def rows_of(*folders):
    """Positions on disk, a row of bytes each."""
    return [row.tobytes() for folder in folders for row in np.load(folder / "positions.npy")]


# ---- BoltzNCE on a molecule of springs ------------------------------------------------------------------------------

ROUND_WORDS = [
    "system=aldp",
    "budget=smoke",
    "samples={n_train: 360, n_validation: 180, batch_size: 200, likelihood: exact}",
    "evaluation={n_samples: 900, batch_size: 200, exact_batch_size: 64, n_exact: 100, n_correction: 100, n_frames: 80}",
    "evaluation={n_bootstrap: 400, n_torus: 50, refine: null}",
]
PER_BATCH, KEPT = 200, 900  # draws at once; kept in all, of 1,000
EXACT_WEIGHTS = TARGET / DRAWN  # of a sample of each conformer
EBM_WEIGHTS = EXACT_WEIGHTS * np.exp(-EBM_ERROR)
COUNTS = np.array([200, 500, 100, 100])  # of each conformer among the kept


@pytest.fixture(scope="module")
def springs_run(tmp_path_factory):
    """Draws for the EBM, evaluation and report of a run whose flow is a `RoundFlow`; seeds of the stages' batches."""
    folder = tmp_path_factory.mktemp("springs")
    work = workspace(folder, ROUND_WORDS, springs(), RoundModels)
    simulated(folder / "aldp-smoke", springs(), 4000)
    work.folder.mark_done("flow", {"steps": 1})
    flow, seeds = work.models.of(work.system).flow, {}
    for name in ("samples", "ebm", "evaluation", "report"):
        before = len(flow.seeds)
        with work.folder.stage(name) as info:
            info.update({"steps": 1} if name == "ebm" else boltznce.STAGES[name](work))
        seeds[name] = flow.seeds[before:]
    return work, seeds


@pytest.fixture(scope="module")
def metrics(springs_run):
    work, _ = springs_run
    return json.loads((work.folder.path / "metrics.json").read_text())


@pytest.mark.parametrize("parity", [True, False])
def test_likelihoods_are_those_of_what_is_kept(parity):
    """Of a flow that makes mirror images as often as molecules, a mirrored draw has both their densities."""
    config = compose("train", ROUND_WORDS)
    generator = RoundModels(config, parity).of(springs())
    for likelihood in ("exact", "hutchinson"):
        batch = generator.draw(PER_BATCH, likelihood, torch.Generator().manual_seed(0))
        assert len(batch.positions) == PER_BATCH * 18 / 20
        assert (springs().chirality(batch.positions) == 1).all()
        torch.testing.assert_close(batch.log_prob, log_mixture(batch.positions, DRAWN), rtol=0, atol=1e-6)
        torch.testing.assert_close(generator.log_prob(batch.positions), batch.log_prob, rtol=0, atol=1e-6)
    assert batch.counts["mirrored"] == (PER_BATCH * 9 / 20 if parity else 0)
    # a mixture, normalized, that is off by its populations alone: so are the weights
    weights = torch.exp(-batch.energy - batch.log_prob).numpy()
    np.testing.assert_allclose(weights, EXACT_WEIGHTS[nearest(batch.positions)], rtol=1e-3)


def test_weights_on_disk(springs_run):
    work, _ = springs_run
    drawn = arrays(work.samples("weighted", work.system))
    np.testing.assert_array_equal(np.bincount(nearest(drawn.positions)), COUNTS)
    np.testing.assert_allclose(drawn.energy, -log_mixture(torch.from_numpy(drawn.positions), TARGET), atol=1e-3)
    expected = np.log(EBM_WEIGHTS) - EBM_CONSTANT
    np.testing.assert_allclose(drawn.log_weights, expected[nearest(drawn.positions)], atol=1e-3)
    for name, n in (("train", 360), ("validation", 180)):
        samples = arrays(work.samples(name, work.system))
        assert len(samples.positions) == n
        np.testing.assert_allclose(samples.log_prob, log_mixture(torch.from_numpy(samples.positions), DRAWN), atol=1e-6)


@pytest.mark.parametrize("drawn_by", ["uniform", "weights"])
def test_exact_likelihoods_on_disk(springs_run, drawn_by):
    """They are those of the allowed samples that their subset names, as many in the state as in the rest."""
    work, _ = springs_run
    drawn = arrays(work.samples("weighted", work.system)).positions
    allowed = drawn[np.isin(nearest(drawn), [STATE, REST])]
    exact = arrays(work.samples(f"exact_{drawn_by}", work.system))
    index = np.unique(exact.subset)
    assert len(exact.subset) == 100
    assert (len(index) == 100) == (drawn_by == "uniform")
    np.testing.assert_array_equal(exact.positions, allowed[index])
    np.testing.assert_allclose(exact.log_prob, log_mixture(torch.from_numpy(exact.positions), DRAWN), atol=1e-6)
    np.testing.assert_array_equal(np.bincount(nearest(allowed[exact.subset])), [50, 50])


def test_exact_likelihoods_of_frames(springs_run):
    """Of frames that the flow was not trained on, drawn by weight, as many in the state as in the rest."""
    work, _ = springs_run
    test = work.frames(work.system).split(**work.config.data.split)[2].positions
    test = test[np.isin(nearest(test), [STATE, REST])]
    exact = arrays(work.samples("exact_frames", work.system))
    np.testing.assert_array_equal(exact.positions, test[np.unique(exact.subset)])
    np.testing.assert_allclose(exact.log_prob, log_mixture(torch.from_numpy(exact.positions), DRAWN), atol=1e-6)
    np.testing.assert_array_equal(np.bincount(nearest(test[exact.subset])), [40, 40])


def test_draws_to_train_on_to_validate_and_to_evaluate_are_three_sets(springs_run):
    work, seeds = springs_run
    rows = rows_of(*(work.samples(name, work.system) for name in ("train", "validation", "weighted")))
    assert len(set(rows)) == len(rows) == 360 + 180 + KEPT
    assert len(set(seeds["samples"])) == len(seeds["samples"]) == 3
    assert set(seeds["samples"]).isdisjoint(seeds["evaluation"])
    assert len(set(seeds["evaluation"][:5])) == 5
    assert seeds["report"] == []


TURNED = (0.6, 0.3, 0.06, 0.04)  # populations of the other molecule


class Pair:
    """Two molecules of springs with every role, as a family has them."""

    def __init__(self):
        self.name, self.temperature, self.pair = "pair", 300.0, [springs("left"), springs("right", TURNED)]

    def all_members(self):
        return self.pair

    def members(self, role):
        return self.pair

    def label(self, member):
        return member.name


def test_members_have_random_numbers_folders_and_rows_of_their_own(tmp_path, monkeypatch):
    words = [*ROUND_WORDS, "samples={n_train: 40, n_validation: 20}", "evaluation={n_samples: 40, n_exact: 8}"]
    work = workspace(tmp_path, words, Pair(), RoundModels)
    stages.draw_training_samples(work)
    seeds = [seed for flow in work.models.flows.values() for seed in flow.seeds]
    assert len(set(seeds)) == len(seeds) == 4
    with work.folder.stage("evaluation") as info:
        info.update(evaluate(work))
    evaluated = info["per_sample"]
    assert set(evaluated) == {"left", "right"}
    assert all(set(of_one) == {"draw", "exact", "ebm"} for of_one in evaluated.values())
    kinds, samples = ("train", "validation", "weighted"), work.folder.path / "samples"
    rows = rows_of(*(samples / kind / name for kind in kinds for name in evaluated))
    assert len(set(rows)) == len(rows) == 2 * (40 + 20 + 40)
    for stage in ("flow", "ebm"):
        work.folder.mark_done(stage, {"steps": 1})
    for member in work.system.pair:
        simulated(tmp_path / "aldp-smoke" / member.name, member, 400)
    written = {}
    monkeypatch.setattr(
        report, "write_report", lambda folder, results, figures, captions, also: written.update(results)
    )
    boltznce.STAGES["report"](work)
    found = {name: row["free_energy"]["exact"].value for name, row in written["members"].items()}
    known = {"left": math.log(TARGET[REST] / TARGET[STATE]), "right": math.log(TURNED[REST] / TURNED[STATE])}
    # 40 draws are not all of a round: what is off is their counts
    counts = {name: np.bincount(nearest(np.load(samples / "weighted" / name / "positions.npy"))) for name in known}
    off = {name: math.log(n[REST] / n[STATE]) - math.log(DRAWN[REST] / DRAWN[STATE]) for name, n in counts.items()}
    assert found == pytest.approx({name: known[name] + off[name] for name in known}, abs=1e-3)
    sizes = [row["ess"]["EBM weights"]["ess"] for row in written["members"].values()]
    assert sizes[0] != pytest.approx(sizes[1])
    assert written["average"]["ess"] == pytest.approx(np.mean(sizes))
    for row in written["members"].values():
        assert (row["counts"]["drawn"], row["counts"]["kept"]) == (200, 40)
    assert written["counts"] == {"molecules trained on": 2}


def test_free_energies_of_the_report(metrics):
    rows, exact = metrics["free_energy"], math.log(TARGET[REST] / TARGET[STATE])
    assert rows["ebm"]["value"] == pytest.approx(exact + EBM_ERROR[STATE] - EBM_ERROR[REST], abs=1e-3)
    assert rows["exact"]["value"] == pytest.approx(exact, abs=1e-3)
    assert rows["corrected"]["value"] == pytest.approx(exact, abs=1e-3)
    assert rows["two_sided"]["value"] == pytest.approx(exact, abs=1e-3)
    assert rows["corrected"]["correction_state"] == pytest.approx(EBM_ERROR[STATE] + EBM_CONSTANT, abs=1e-3)
    assert rows["corrected"]["correction_rest"] == pytest.approx(EBM_ERROR[REST] + EBM_CONSTANT, abs=1e-3)
    assert rows["unweighted"]["value"] == pytest.approx(math.log(500 / 200), abs=1e-6)
    bias = pytest.approx(EBM_ERROR[STATE] - EBM_ERROR[REST], abs=1e-3)
    assert metrics["ebm_bias"] == {"ebm": {"value": bias, "std_error": pytest.approx(0, abs=1e-3)}}
    assert rows["corrected"]["reliable"]
    assert not rows["ebm"]["reliable"]
    # likelihoods are right but for the EBM's constants: what is left is the noise of the counts
    for name, sides in (
        ("ebm", (200, 500)),
        ("corrected", (200, 500)),
        ("two_sided", (200, 500)),
        ("unweighted", (200, 500)),
        ("exact", (200, 500)),
    ):
        error = math.sqrt(sum(1 / n for n in sides))
        assert rows[name]["std_error"] == pytest.approx(error, rel=0.15), name
        low, high = rows[name]["interval"]
        assert high - low == pytest.approx(2 * 1.96 * error, rel=0.2), name
        seen = (rows[name]["n_state"], rows[name]["n_rest"])
        assert seen == ((50, 50) if name == "exact" else sides) or name in ("corrected", "two_sided")
    assert (metrics["weighted"], metrics["state"]) == ("ebm", "0 < φ < 2 rad")
    assert metrics["headline"]["row"] in ("two_sided", "corrected", "exact")  # which all are the same
    assert metrics["error"] == pytest.approx(rows["ebm"]["value"] - rows["reference"]["value"])


def ess(weights):
    return weights.sum() ** 2 / (len(weights) * (weights**2).sum())


def test_the_report_is_what_is_on_disk(springs_run, metrics):
    """Every number of ``metrics.json`` once more, by formulas of this test from the arrays on disk."""
    work, _ = springs_run
    drawn = arrays(work.samples("weighted", work.system))
    which, weights = nearest(drawn.positions), np.exp(drawn.log_weights - drawn.log_weights.max())
    weights /= weights.sum()
    trans = np.isin(which, [STATE, REST])
    frames = work.frames(work.system).split(**work.config.data.split)[2]
    of_data = nearest(frames.positions)
    assert len(metrics["ess"]) == 3
    assert metrics["ess"]["EBM weights"]["ess"] == pytest.approx(ess(weights))
    assert metrics["ess"]["EBM weights"]["n"] == KEPT
    assert metrics["ess"]["EBM weights, top 0.2% removed"]["n"] == KEPT - 2
    assert metrics["ess"]["EBM weights, top 0.2% removed"]["ess"] == pytest.approx(ess(np.sort(weights)[:-2]))
    standing_for = np.repeat([EXACT_WEIGHTS[STATE] * 200, EXACT_WEIGHTS[REST] * 500], 50)
    assert metrics["ess"]["exact weights (subset)"]["ess"] == pytest.approx(ess(standing_for), rel=1e-3)
    left_out = {"n": int((~trans).sum()), "by_count": (~trans).mean(), "by_weight": weights[~trans].sum()}
    left_out["data"] = np.isin(of_data, [CIS_STATE, CIS_REST]).mean()
    assert metrics["excluded"]["peptide bond turned"] == pytest.approx(left_out)
    assert metrics["excluded"]["inverted stereocentre"] == {"n": 0, "by_count": 0, "by_weight": 0, "data": 0}
    assert (metrics["counts"]["drawn"], metrics["counts"]["kept"]) == (1000, KEPT)
    assert metrics["made"] == {
        "right_graph": 0.9,
        "kept": 0.9,
        "reordered": 0.0,
        "mirrored": 0.45,
        "turned": pytest.approx(2 / 9),
    }
    agreement = metrics["likelihood"]
    assert (agreement["n"], agreement["std"]) == (100, pytest.approx(0.5 * math.sqrt(100 / 99), abs=1e-4))
    for side, conformer in (("state", STATE), ("rest", REST)):
        known = {"n": 50, "mean": EBM_ERROR[conformer] + EBM_CONSTANT, "std": 0.0}
        assert agreement["per_state"][side] == pytest.approx(known, abs=1e-4)
    energies = frames.energies[np.isin(of_data, [STATE, REST])]
    assert metrics["energy_cut"]["cut"] == pytest.approx(energies.max() + 50, abs=5)
    found = metrics["distances"]["E-W2 (kT)"]
    for kind, shares in (("unweighted", None), ("weighted", weights[trans])):
        known = energy_distance(drawn.energy[trans], energies, shares)
        assert found[kind] == pytest.approx(known, abs=0.3)  # that of the report is to resampled frames
    # ΔF of the simulation, and what the samples and it cost
    inside = of_data[np.isin(of_data, [STATE, REST])] == STATE
    simulation = metrics["free_energy"]["reference"]
    assert simulation["value"] == pytest.approx(math.log((~inside).sum() / inside.sum()))
    seconds, md = work.folder.stages["evaluation"]["per_sample"][work.system.name], metrics["md"]
    assert {name: metrics["timing"][f"{name}_per_sample"] for name in seconds} == pytest.approx(seconds)
    row = metrics["free_energy"][metrics["headline"]["row"]]
    off = max(abs(row["value"] - simulation["value"]), row["std_error"])
    assert md["error"] == pytest.approx(math.hypot(off, simulation["std_error"]))
    n_frames = 1 / (inside.mean() * (1 - inside.mean()) * md["error"] ** 2)  # independent ones, for that error
    assert md["md_seconds"] == pytest.approx(n_frames * 1e7 / 4000, rel=0.4)
    n_exact = {"two_sided": 100 + 80, "corrected": 100, "exact": 100}[metrics["headline"]["row"]]
    spent = KEPT * seconds["draw"] + n_exact * seconds["exact"]
    spent += 1e7 * (metrics["headline"]["row"] == "two_sided")
    assert md["flow_seconds"] == pytest.approx(spent, abs=2)
    assert md["speed_up"] == pytest.approx(md["md_seconds"] / md["flow_seconds"])
    assert md["training_seconds"] < 60
    assert md["speed_up_trained"] == pytest.approx(md["md_seconds"] / (md["flow_seconds"] + md["training_seconds"]))


def energy_distance(ours, data, shares):
    """W2 by quantiles on a fine grid."""
    levels, order = (np.arange(20_000) + 0.5) / 20_000, np.argsort(ours)
    cumulated = np.cumsum(np.full(len(ours), 1 / len(ours)) if shares is None else (shares / shares.sum())[order])
    quantiles = ours[order][np.minimum(np.searchsorted(cumulated, levels), len(ours) - 1)]
    return math.sqrt(np.mean((quantiles - np.quantile(data, levels, method="inverted_cdf")) ** 2))


def test_conformers_that_simulations_never_visit():
    x = conformers().float()
    masks = excluded_conformers(springs(), torch.cat([x, -x]).numpy())
    assert masks["peptide bond turned"].tolist() == [False, False, True, True] * 2
    assert masks["inverted stereocentre"].tolist() == [False] * 4 + [True] * 4
    assert allowed_conformers(masks, 8).tolist() == [True] * 2 + [False] * 6
    assert allowed_conformers({}, 3).all()


# ---- what models are trained on -------------------------------------------------------------------------------------


class Recorder(torch.nn.Module):
    """In place of a flow or an EBM: keeps what it is given to learn."""

    def __init__(self, name):
        super().__init__()
        self.weight, self.name, self.seen, self.regressed, self.calibrated = (
            torch.nn.Parameter(torch.ones(())),
            name,
            [],
            [],
            None,
        )

    def of(self, member):
        return self

    def calibrate(self, member, x, generator):
        self.calibrated = x

    def loss(self, x, generator):
        self.seen.append(x)
        return 3 * self.weight if self.name == "flow" else {"loss": 3 * self.weight}

    def regression_loss(self, x, log_q):
        torch.testing.assert_close(x, self.seen[-1])
        self.regressed.append(log_q)
        return 2 * self.weight


@pytest.fixture
def trained(monkeypatch):
    """Trains a `Recorder`: 20 steps and a validation; returns what it has seen in these and was calibrated on."""

    def train_it(work, name):
        monkeypatch.setattr(stages, "make", lambda config, system, name: Recorder(name))
        losses = {}

        def fit(self, name, module, loss, validate):
            for step in range(20):
                losses["train"] = loss(module, step, torch.Generator().manual_seed(step))
            train, module.seen = torch.cat(module.seen), []
            log_q, module.regressed = module.regressed, []
            losses["validation"] = validate(module, torch.Generator().manual_seed(99))
            validation = torch.cat(module.seen)
            losses["seen"] = {"train": train, "validation": validation, "calibration": module.calibrated}
            losses["log_q"] = {"train": log_q, "validation": module.regressed}
            return {"steps": 20, "skipped_steps": 0, "validation_loss": 0.0}

        monkeypatch.setattr(Workspace, "fit", fit)
        (stages.train_flow if name == "flow" else stages.train_ebm)(work)
        return losses

    return train_it


def originals(x, frames):
    """Rows of ``frames`` that x were made from: the α-carbon is where it was. Every other atom but methyls' is, too."""
    numbers = {frame[8].tobytes(): number for number, frame in enumerate(frames)}
    index = np.array([numbers.get(row[8].tobytes(), -1) for row in x.numpy()])
    assert (index >= 0).all()
    others = np.setdiff1d(np.arange(22), np.ravel(aldp().methyl_groups))
    np.testing.assert_array_equal(x.numpy()[:, others], frames[index][:, others])
    return index


def shares_of_turns(x, frames):
    """How often each methyl of x was turned by 0, 1 or 2 hydrogens, (methyls, 3); nothing else may happen to it."""
    found = []
    for group in map(list, aldp().methyl_groups):
        turned = [
            (x.numpy()[:, group] == np.roll(frames[:, group], shift, axis=1)).all(axis=(1, 2)) for shift in range(3)
        ]
        assert (np.sum(turned, axis=0) == 1).all()
        found.append(np.mean(turned, axis=1))
    return np.array(found)


def test_an_ebm_is_trained_on_draws_with_turned_methyls_and_validated_on_others(springs_run, trained):
    work, _ = springs_run
    losses = trained(work, "ebm")
    draws = {name: arrays(work.samples(name, work.system)) for name in ("train", "validation")}
    for part in ("train", "calibration"):
        x, frames = losses["seen"][part], draws["train"].positions
        index = originals(x, frames)
        assert len(set(index)) > 0.9 * len(frames)
        np.testing.assert_allclose(shares_of_turns(x, frames[index]), 1 / 3, atol=0.12)
        if part == "train":
            np.testing.assert_allclose(torch.cat(losses["log_q"][part]), draws[part].log_prob[index], rtol=1e-6)
    np.testing.assert_array_equal(losses["seen"]["validation"], draws["validation"].positions)
    np.testing.assert_allclose(torch.cat(losses["log_q"]["validation"]), draws["validation"].log_prob, rtol=1e-6)
    weight = work.config.ebm.regression_weight
    for part in ("train", "validation"):
        assert losses[part]["regression"].item() == 2
        assert losses[part]["loss"].item() == pytest.approx(3 + 2 * weight)


def test_a_flow_is_trained_on_balanced_frames_with_turned_methyls(tmp_path, trained):
    """c = P(rest) / P(state) of the frames, κ = 10: a quarter of the frames is more than half of a batch."""
    words = ["system=aldp", "budget=smoke", "flow={n_train: 4000, n_validation: 2000}"]
    work = workspace(tmp_path, words, springs())
    simulated(tmp_path / "aldp-smoke", springs(), 6000)
    losses = trained(work, "flow")
    to_train, held_out, _ = work.frames(springs()).split(**work.config.data.split)
    parts = {"train": to_train, "validation": held_out}
    for seen, part in (("train", "train"), ("calibration", "train"), ("validation", "validation")):
        x, frames = losses["seen"][seen], parts[part].positions
        index = originals(x, frames)
        phi = springs().coordinate(np.array(frames), "phi")
        inside = (phi > 0) & (phi < 2)
        c = (~inside).sum() / inside.sum()
        weights = c * vonmises.pdf(phi, 10.0, loc=1.0) + 1
        expected = weights[inside].sum() / weights.sum()
        assert expected > inside.mean() + 0.3
        assert inside[index].mean() == pytest.approx(expected, abs=4 * math.sqrt(0.25 / min(len(x), 2000)))
        if part == "train":
            np.testing.assert_allclose(shares_of_turns(x, frames[index]), 1 / 3, atol=0.05)
    assert losses["train"]["loss"].item() == losses["validation"]["loss"].item() == 3


# ---- a real network that makes mirror images ------------------------------------------------------------------------

MIRROR_WORDS = [
    "system=aldp",
    "method=boltznce",
    "budget=smoke",
    "flow.network={width: 16, n_rounds: 1, chiral: false}",
    "flow={n_train: 200, n_validation: 32, batch_size: 32}",
    "flow.fit={steps: 2, validate_every: 2}",
    "flow.solver={method: rk4, steps: 6}",
    "samples={n_train: 4, n_validation: 2, batch_size: 4, likelihood: exact}",
    "ebm.network.width=16",
    "ebm.batch_size=4",
    "ebm.fit={steps: 2, validate_every: 2}",
    "evaluation={n_samples: 64, batch_size: 64, exact_batch_size: 4, n_exact: 4, n_correction: 2}",
    "evaluation={n_bootstrap: 20, n_torus: 20}",
]


def accept_every_conformer(self, x, batch_size=1024):
    right, order = torch.ones(len(x), dtype=torch.bool), torch.arange(x.shape[1]).repeat(len(x), 1)
    return GraphCheck(right, order, torch.zeros(len(x), dtype=torch.bool))


@pytest.mark.slow
def test_a_run_of_a_network_that_makes_mirror_images(tmp_path, monkeypatch):
    """log q of kept draws, of given positions and of the report is log[q(x) + q(-x)], where q is the flow's."""
    monkeypatch.setattr(BondGraph, "check", accept_every_conformer)  # two steps of training make no molecules
    simulated(tmp_path / "aldp-smoke", aldp(), 400)
    config = compose("train", [*MIRROR_WORDS, f"data_dir={tmp_path}", "threads=1", "device=cpu"])
    train(RunFolder.create(tmp_path / "run", config, "aldp"))
    generator = load_run(tmp_path / "run", device="cpu").generator()

    def density(x):
        options = {"solver": solver_settings(config.flow.solver), "batch_size": 32}
        here, mirrored = (generator.flow.log_prob(torch.from_numpy(each), **options).numpy() for each in (x, -x))
        return np.logaddexp(here, mirrored)

    samples = tmp_path / "run" / "samples"
    exact, drawn = arrays(samples / "exact_uniform"), arrays(samples / "train")
    np.testing.assert_allclose(exact.log_prob, density(exact.positions), atol=0.01)
    np.testing.assert_allclose(generator.log_prob(torch.from_numpy(exact.positions)), exact.log_prob, atol=0.01)
    # along the path of the draws: another solution of the same equation
    np.testing.assert_allclose(drawn.log_prob, density(drawn.positions), atol=0.1)
    made = json.loads((tmp_path / "run" / "metrics.json").read_text())["made"]
    assert made["kept"] == 1.0
    assert 0.3 < made["mirrored"] < 0.7


# ---- TA-BG with a generator of one parameter ------------------------------------------------------------------------

SPRING_WORDS = [
    "system=double_well",
    "method=tabg",
    "budget=smoke",
    "hot.temperature=4.0",
    "hot.batch_size=256",
    "hot.fit={steps: 120, lr: 0.05, schedule: cosine, warmup_steps: 0, ema_decay: null}",
    "annealing={n_steps: 2, repeat_last: 0, n_draws: 4000, n_buffer: 4000, clip: 0.01, batch_size: 256}",
    "annealing.fit={steps: 120, lr: 0.05, schedule: cosine, ema_decay: null}",
    "evaluation={n_samples: 20000, n_ladder: 500, n_reference: 20000, n_torus: 100, n_bootstrap: 100, clip: 0.0}",
]


@pytest.fixture
def gaussian_flows(monkeypatch):
    for module in (tabg, spline_models):
        monkeypatch.setattr(module, "make_spline_flow", lambda config, system: GaussianFlow())


def variance(work, name):
    flow = load_trained(GaussianFlow(), weights_path(work.folder.path, name))
    return float(flow.log_std.detach().exp().square())


def covered(hot, cold):
    """ESS of draws of variance ``hot`` in the plane, weighted to ``cold``."""
    return cold * (2 * hot - cold) / hot**2


@pytest.mark.parametrize("objective", ["reverse_kl", "log_variance", "path_kl"])
def test_temperatures_of_the_ladder(tmp_path, gaussian_flows, objective):
    """Every flow comes to have the variance of its temperature, at which alone energies were asked for."""
    annealing = objective if objective != "reverse_kl" else "forward_kl"
    words = [*SPRING_WORDS, f"hot.objective={objective}", f"annealing.objective={annealing}"]
    work = workspace(tmp_path, words, Spring())
    asked = work.system.asked
    hot = tabg.train_hot(work)
    assert set(asked) == {4.0}
    assert hot["energy_evaluations"] == 120 * 256
    assert variance(work, "hot") == pytest.approx(4.0, rel=0.05)
    asked.clear()
    annealed = tabg.anneal(work)
    assert set(asked) == {2.0, 1.0}
    assert asked == sorted(asked, reverse=True)
    assert annealed["energy_evaluations"] == 2 * (4000 + (0 if objective == "reverse_kl" else 120 * 256))
    for name, cold in (("anneal_00", 2.0), ("anneal_01", 1.0)):
        # resampling by clipped weights leaves out a little of what is wide
        assert variance(work, name) == pytest.approx(cold, rel=0.12)
    for step, (drawn_at, weighted_to) in zip(annealed["steps"], ((4.0, 2.0), (2.0, 1.0)), strict=True):
        assert (step["drawn_at"], step["weighted_to"], step["n_draws"]) == (drawn_at, weighted_to, 4000)
        assert step["ess"] == pytest.approx(covered(drawn_at, weighted_to), abs=0.06)


def clipped(log_weights, share):
    top = np.argsort(log_weights)[len(log_weights) - round(share * len(log_weights)) :]
    expected = np.array(log_weights)
    expected[top] = log_weights[top].min()
    return expected


def test_buffers_are_clipped(tmp_path, gaussian_flows, monkeypatch):
    """What a stage resamples: its draws, with their weights to the colder temperature, the top hundredth clipped."""
    work = workspace(tmp_path, SPRING_WORDS, Spring())
    save_weights(weights_path(work.folder.path, "hot"), GaussianFlow(math.log(0.8)).state_dict(), {})
    buffers = []

    def resample(drawn, n, generator):
        buffers.append(drawn)
        return drawn[np.arange(len(drawn))]

    monkeypatch.setattr(WeightedSamples, "resample", resample)
    record = tabg.anneal(work)["steps"][0]
    drawn = buffers[0]  # to train the first stage on, by a hot flow that is too narrow: its weights are heavy
    squares = ((drawn.positions[:, 0] - [Spring.MEAN, 0]) ** 2).sum(-1)
    raw = -squares / (2 * 2.0) + squares / (2 * 0.64) - math.log(2.0) + math.log(0.64)
    weights = -drawn.energy - drawn.log_prob
    np.testing.assert_allclose(weights - weights.mean(), raw - raw.mean(), atol=1e-4)
    np.testing.assert_array_equal(drawn.log_weights, clipped(weights, 0.01))
    assert record["ess"] == pytest.approx(ess(np.exp(weights)))
    assert record["ess_clipped"] == pytest.approx(ess(np.exp(clipped(weights, 0.01))))
    assert record["ess_clipped"] > record["ess"]
    again, _ = fill_buffer(
        lambda n, generator: (torch.from_numpy(np.array(drawn.positions)), torch.from_numpy(drawn.log_prob)),
        lambda x: torch.from_numpy(drawn.energy),
        tmp_path / "buffer",
        temperatures=(4.0, 2.0),
        n_draws=4000,
        clip=0.1,
        batch_size=4000,
        generator_of=lambda k: None,
    )
    np.testing.assert_array_equal(again.log_weights, clipped(weights, 0.1))


def test_report_of_a_ladder(tmp_path, gaussian_flows):
    """A hot flow that is right and a cold one that is too wide, of variance 1.3."""
    work = workspace(tmp_path, [*SPRING_WORDS, "annealing.n_steps=1"], Spring())
    for name, wide in (("hot", 4.0), ("anneal_00", 1.3)):
        save_weights(weights_path(work.folder.path, name), GaussianFlow(math.log(wide) / 2).state_dict(), {})
    step = {
        "drawn_at": 4.0,
        "weighted_to": 1.0,
        "n_draws": 77,
        "ess": 0.5,
        "ess_clipped": 0.6,
        "pareto_k": 0.1,
        "steps": 9,
    }
    work.folder.mark_done("hot", {"steps": 5, "energy_evaluations": 1000})
    work.folder.mark_done("annealing", {"steps": [step], "energy_evaluations": 77})
    for name, stage in (("evaluation", ladder.evaluate_ladder), ("report", ladder.report_ladder)):
        with work.folder.stage(name) as info:
            info.update(stage(work))
    metrics = json.loads((work.folder.path / "metrics.json").read_text())
    rows, sizes = metrics["free_energy"], metrics["ess"]
    for name, wide in (("reference", 1.0), ("exact", 1.0), ("unweighted", 1.3)):
        low = norm.cdf(-Spring.MEAN / math.sqrt(wide))
        assert rows[name]["value"] == pytest.approx(
            math.log(low / (1 - low)), abs=1e-3 if name == "reference" else 0.05
        )
    assert sizes["exact weights"]["ess"] == pytest.approx(covered(1.3, 1.0), abs=0.01)
    assert sizes["flow of 4, at its own temperature"]["ess"] == pytest.approx(1.0, abs=1e-6)
    assert sizes["flow of 4, at its own temperature"]["n"] == 500
    assert sizes["ladder, 4 to 1"] == {"ess": 0.5, "pareto_k": 0.1, "n": 77}
    (held_out,) = metrics["held_out"].values()
    assert held_out["nll"] == pytest.approx(math.log(2 * math.pi * 1.3) + 1 / 1.3, abs=0.03)
    distances = metrics["distances"]["E-W2 (kT)"]  # energies are exponentially distributed, of means 1.3 and 1
    assert distances["unweighted"] == pytest.approx(0.3 * math.sqrt(2), abs=0.08)
    assert distances["weighted"] < 0.15
    assert metrics["modes"] == {"exact": [pytest.approx(1)], "flow": [1], "flow, weighted": [pytest.approx(1)]}
    counts = metrics["counts"]
    assert counts["energy evaluations, training in all"] == 1077
    assert counts["energy evaluations, this evaluation"] == 20_500
    rows = rows_of(*(work.samples(name, work.system) for name in ("hot", "weighted")))
    assert len(set(rows)) == len(rows) == 20_500


# ---- formulas that wiring once broke --------------------------------------------------------------------------------


def test_umbrella_windows_that_nothing_crosses_between_are_cut_apart(tmp_path):
    """A barrier of 25 kT at 2.1 rad: by `gather` and `result_of` the known ΔF, with the ring cut at its gap."""
    windows = VonMisesWindows(200, seed=2, barrier=25.0, stuck=True)
    phi = windows.dihedral
    x = np.zeros((len(phi), 4, 3))
    x[:, 0, 0], x[:, 2, 2] = 1.0, 1.0
    x[:, 3] = np.stack([np.cos(phi), np.sin(phi), np.ones(len(phi))], axis=-1)
    topology = app.Topology()
    residue = topology.addResidue("CHN", topology.addChain())
    for k in range(4):
        topology.addAtom(f"C{k}", app.Element.getBySymbol("C"), residue)
    made_of = {"topology": mdtraj.Topology.from_openmm(topology), "openmm_topology": lambda: topology}
    made_of |= {"exact": False, "dim": 3, "dihedrals": {"phi": (0, 1, 2, 3)}, "state": State("phi", (0.0, 2.0))}
    system = SimpleNamespace(proxy=None, identity={"name": "chain"}, positions=torch.from_numpy(x[0]), **made_of)
    folders = []
    for repeat in range(2):
        lengths = {"duration": 100.0, "frame_interval": 1.0, "segment_length": 100.0, "equilibration": 0.0}
        masses = {"timestep": 0.002, "friction": 1.0, "hydrogen_mass": None, "platform": "auto"}
        options = {"n_windows": 24, "kappa": 60.0, "exchange_interval": 0.5}
        job = Job("umbrella", 300.0, 4, repeat, **lengths, **masses, dihedral=(0, 1, 2, 3), options=options)
        assert job.kT == pytest.approx(KT)
        folders.append(tmp_path / f"repeat_{repeat}")
        job.save(folders[-1], openmm.System(), x[0])
        mine = np.arange(len(phi)) // 24 % 2 == repeat
        frames = np.zeros(mine.sum(), dtype=frame_dtype(4))
        frames["positions"], frames["dihedral"], frames["window"] = x[mine], phi[mine], windows.window[mine]
        frames["time"] = np.arange(len(frames)) // 24 + 1.0
        (folders[-1] / "frames.bin").write_bytes(frames.tobytes())
        np.savez(folders[-1] / "state.npz", seconds=3.0)
    dataset = simulate.gather(system, folders, tmp_path / "data")
    assert dataset.meta["cut"] == pytest.approx(windows.top, abs=0.3)
    assert dataset.meta["cpu_seconds"] == 6.0
    angle = np.arctan2(dataset.positions[:, 3, 1], dataset.positions[:, 3, 0])
    inside, weights = (angle > 0) & (angle < 2), np.exp(dataset.log_weights)
    assert np.log(weights[~inside].sum() / weights[inside].sum()) == pytest.approx(windows.delta_f(), abs=0.3)
    assert result_of(dataset, system, n_blocks=2).delta_f == pytest.approx(windows.delta_f(), abs=0.3)
    for state in ((2.5, 4.0), (-3.8, -2.6), (-1.0, 1.0)):
        ours = free_energy_difference(angle, dataset.log_weights, state, n_bootstrap=5).value
        system.state = State("phi", state)
        assert result_of(dataset, system, n_blocks=2).delta_f == pytest.approx(ours, abs=0.01)


class Table(torch.nn.Module):
    """Energies as they are given."""

    def __init__(self, values):
        super().__init__()
        self.values = torch.nn.Parameter(values)

    def forward(self, x, t, features=None):
        return self.values


def test_regression_takes_the_best_constant():
    """Neither the loss nor its gradient, the centred differences / n, feels a constant in energies or likelihoods."""
    energies, log_q = torch.randn(2, 64, generator=torch.Generator().manual_seed(0)) * 3
    centred = energies - log_q - (energies - log_q).mean()
    for of_energy, of_log_q in ((0.0, 0.0), (-70.0, 0.0), (0.0, 40.0), (500.0, -300.0)):
        ebm = EnergyBasedModel(Table(energies + of_energy), 1, 2, centred=False)
        loss = ebm.regression_loss(torch.zeros(64, 1, 2), log_q + of_log_q)
        loss.backward()
        assert loss.item() == pytest.approx(centred.square().mean().item() / 2, rel=1e-4)
        torch.testing.assert_close(ebm.network.values.grad, centred / 64, rtol=1e-3, atol=1e-5)


def test_the_total_interval_has_the_noise_of_both_parts():
    # likelihoods off by a constant on either side: the noise is that of the counts, 100 and 300
    angle, subset = np.repeat([1.0, -1.5], [100, 300]), np.r_[0:50, 100:150]
    off = np.where(angle[subset] > 0, 0.7, -0.3)
    found = corrected_free_energy_difference(angle, np.zeros(400), subset, off, np.zeros(100))
    assert found.value == pytest.approx(math.log(3) - 1.0)
    assert found.std_error == pytest.approx(math.sqrt(1 / 100 + 1 / 300))
    assert np.ptp(found.interval) == pytest.approx(2 * 2.01 * found.std_error, rel=0.01)  # t of 50 - 1
    # as good as all samples there are: the noise is that of exp(d) over the subset
    angle, subset = np.repeat([1.0, -1.5], 10_000), np.r_[0:100, 10_000:10_100]
    off = 0.5 * np.random.default_rng(0).normal(size=200)
    found = corrected_free_energy_difference(angle, np.zeros(20_000), subset, off, np.zeros(200))
    relative = [np.std(np.exp(side)) / np.mean(np.exp(side)) for side in (off[:100], off[100:])]
    assert found.std_error == pytest.approx(math.hypot(*relative) / 10, rel=0.05)
    assert found.correction_error == pytest.approx(math.hypot(*relative) / 10, rel=0.01)


def test_springs_do_not_overlap():
    """What all this rests on: a sample belongs to one conformer, and those about it are that molecule."""
    x = conformers() + SPREAD * torch.randn(4, 22, 3, generator=torch.Generator().manual_seed(0))
    alone = [log_mixture(x[k : k + 1], np.eye(4)[k]) + math.log(TARGET[k]) for k in range(4)]
    torch.testing.assert_close(torch.cat(alone), log_mixture(x, TARGET))
    assert nearest(x).tolist() == [STATE, REST, CIS_STATE, CIS_REST]
    assert BondGraph.of(aldp().topology).check(x.float()).right.all()
