"""Refinement of draws: known answers for generators whose density is known, and what runs and reports make of it."""

import copy
import json
import math

import numpy as np
import pytest
import torch
from known import (
    CIS_REST,
    CIS_STATE,
    EBM_CONSTANT,
    EBM_ERROR,
    REST,
    SPREAD,
    STATE,
    TARGET,
    RoundModels,
    aldp,
    conformers,
    log_mixture,
    nearest,
    simulated,
    springs,
)
from omegaconf import OmegaConf
from test_known_answers import ROUND_WORDS, arrays, workspace

from boltznce import load_system
from boltznce.analysis.free_energy import free_energy_difference
from boltznce.analysis.plotting import plot_refinement
from boltznce.analysis.reweighting import WeightedSamples
from boltznce.config import compose
from boltznce.data.dataset import Dataset
from boltznce.data.members import draw_dataset, load_data
from boltznce.errors import UserError
from boltznce.methods import boltznce
from boltznce.methods.drawing import Generator
from boltznce.methods.evaluation import _kin
from boltznce.methods.free_energy import write_free_energy
from boltznce.methods.legs import kernel_of
from boltznce.methods.preflight import check_refinement
from boltznce.methods.proxy import FromProxy, refine_frames
from boltznce.methods.refinement import RefineSettings, refine, require_base, settings_of
from boltznce.methods.shift import shift_of
from boltznce.run import load_run, refined_folder, train_run
from boltznce.smc import AnnealSettings, refined_free_energy_difference
from boltznce.systems.toy import GaussianMixture
from boltznce.units import GAS_CONSTANT

WIDTH = 0.4  # of the Gaussians that a `TwoWells` draws, in the plane


class TwoWells(Generator):
    """A quarter of its draws are of the right well, with the density that it has."""

    default_likelihood = "exact"
    device = torch.device("cpu")

    def __init__(self, system=None):
        self.system = system or load_system("double_well")
        self.lost = 1.0  # share of the energies that are asked for before all is lost

    def models(self, likelihood):
        return ()

    def draws(self, n, seed=0):
        rng = np.random.default_rng(seed)
        centres = np.where(rng.random(n) < 0.25, 1.0, -1.0)[:, None] * np.array([1.0, 0.0])
        x = (centres + WIDTH * rng.normal(size=(n, 2)))[:, None].astype("f4")
        u = self.system.cheap.energy(torch.from_numpy(x)).double().numpy()
        return WeightedSamples(x, u, self.base_log_prob(torch.from_numpy(x)).numpy())

    def base_log_prob(self, x):
        logs = [
            math.log(share) - (x[:, 0] - torch.tensor([at, 0.0])).square().sum(-1) / (2 * WIDTH**2)
            for share, at in ((0.25, 1.0), (0.75, -1.0))
        ]
        return torch.logsumexp(torch.stack(logs), 0).double() - math.log(2 * math.pi * WIDTH**2)


SETTINGS = RefineSettings(AnnealSettings(first_cess=0.95), FromProxy(cess=0.9, first_cess=0.9, n_walkers=2000))


def test_draws_become_those_of_the_target():
    generator, draws = TwoWells(), TwoWells().draws(4000)
    refined = refine(generator, draws, SETTINGS, seed=0)
    values = generator.system.coordinate(refined.positions, generator.system.state.coordinate)
    interval, reference = generator.system.state.interval, generator.system.reference()["delta_f"]["value"]
    found = refined_free_energy_difference(values, refined.log_weights, refined.ancestors, interval)
    assert found.reliable, found
    assert abs(found.value - reference) < 3 * found.std_error < 0.3
    exact = generator.system.energy(generator.system.sample(20000, torch.Generator().manual_seed(0))).mean()
    assert refined.weights @ refined.energy == pytest.approx(float(exact), abs=0.1)
    np.testing.assert_allclose(
        refined.energy, generator.system.energy(torch.from_numpy(refined.positions)).numpy(), rtol=1e-5, atol=1e-5
    )
    assert np.isnan(refined.log_prob).all()
    assert refined.meta["refinement"]["steps"][-1]["beta"] == 1.0
    assert set(refined.meta["refinement"]["gradients"]) == {"base", "system"}
    again = refine(generator, draws, SETTINGS, seed=0)
    np.testing.assert_array_equal(again.positions, refined.positions)
    assert (refine(generator, draws, SETTINGS, seed=1).positions != refined.positions).any()


def test_a_killed_refinement_goes_on(tmp_path):
    generator, draws = TwoWells(), TwoWells().draws(300)
    whole, energy, asked = refine(generator, draws, SETTINGS, seed=3), generator.system.energy, [0]

    def failing(x):
        asked[0] += 1
        if asked[0] == 150:
            raise KeyboardInterrupt
        return energy(x)

    generator.system.energy = failing
    with pytest.raises(KeyboardInterrupt):
        refine(generator, draws, SETTINGS, seed=3, folder=tmp_path / "refined")
    assert [path.name for path in tmp_path.iterdir()] == [".refined.annealing"]
    n_asked = asked[0]
    refined = refine(generator, draws, SETTINGS, seed=3, folder=tmp_path / "refined")
    assert [path.name for path in tmp_path.iterdir()] == ["refined"]
    found = WeightedSamples.load(tmp_path / "refined")
    for name in ("positions", "energy", "log_weights", "ancestors"):
        np.testing.assert_array_equal(getattr(refined, name), getattr(whole, name))
        np.testing.assert_array_equal(getattr(found, name), getattr(whole, name))
    assert asked[0] - n_asked < 150 + n_asked
    n_asked = asked[0]
    refine(generator, draws, SETTINGS, seed=3, folder=tmp_path / "refined")
    assert asked[0] == n_asked  # what is finished is loaded
    for other in ({"seed": 4}, {"settings": [AnnealSettings()]}, {"draws": draws[:200]}):
        given = {"draws": draws, "settings": SETTINGS, "seed": 3} | other
        with pytest.raises(UserError, match="holds other samples"):
            refine(generator, folder=tmp_path / "refined", **given)


def test_other_isomers_are_left_out_and_weigh_nothing():
    """Ancestors are numbers of the draws that were given."""

    class Half(Generator):
        default_likelihood, device, system = "exact", torch.device("cpu"), springs()

        def models(self, likelihood):
            return ()

        def base_log_prob(self, x):
            return log_mixture(x, TARGET)

    which, rng = np.array([CIS_REST, REST, CIS_STATE, STATE, REST, STATE]), np.random.default_rng(0)
    x = (conformers()[which].numpy() + SPREAD * rng.normal(size=(6, *conformers().shape[1:]))).astype("f4")
    draws = WeightedSamples(x, np.zeros(6), np.zeros(6))
    settings = RefineSettings(AnnealSettings(step_size=3e-4, n_moves=1, final_moves=1))
    refined = refine(Half(), draws, settings, seed=0)
    assert refined.ancestors.tolist() == [1, 3, 4, 5]
    np.testing.assert_array_equal(nearest(refined.positions), which[refined.ancestors])
    assert np.isfinite(refined.log_weights).all()
    turning = copy.copy(springs())  # to which all that moves turns
    turning.isomers = lambda x: springs().isomers(x) * (1 if torch.equal(x, torch.from_numpy(draws.positions)) else -1)
    Half.system = turning
    turned = refine(Half(), draws, settings, seed=0)
    assert turned.ancestors.tolist() == [1, 3, 4, 5]
    assert np.isneginf(turned.log_weights).all()


def test_ancestors_go_with_their_samples(tmp_path):
    x = np.zeros((4, 2, 3))
    samples = WeightedSamples(x, np.zeros(4), np.full(4, np.nan), np.zeros(4), ancestors=np.array([0, 0, 2, 3]))
    assert samples[1:].ancestors.tolist() == [0, 2, 3]
    assert len(samples.resample(9, np.random.default_rng(0)).ancestors) == 9
    assert WeightedSamples.load(samples.save(tmp_path / "some")).ancestors.tolist() == [0, 0, 2, 3]
    assert WeightedSamples(x, np.zeros(4), np.zeros(4)).ancestors is None
    with pytest.raises(UserError, match="arrays"):
        WeightedSamples(x, np.zeros(4), np.zeros(4), ancestors=np.zeros(3, int))


def test_the_error_of_refined_samples_counts_ancestors():
    angle, ancestors = np.repeat([1.0, -1.0], 200), np.arange(400)
    once = refined_free_energy_difference(angle, np.zeros(400), ancestors)
    often = refined_free_energy_difference(np.repeat(angle, 9), np.zeros(3600), np.repeat(ancestors, 9))
    assert (often.value, often.std_error) == pytest.approx((once.value, once.std_error))
    assert once.std_error == pytest.approx(math.sqrt(1 / 200 + 1 / 200), rel=0.01)


def test_one_likelihood_is_enough_for_an_ancestors_walkers_on_a_side():
    x = conformers()[[STATE, STATE, REST, STATE, REST]].float().numpy()
    refined = WeightedSamples(x, np.zeros(5), np.zeros(5), np.zeros(5), ancestors=np.array([4, 4, 4, 7, 7]))
    assert _kin(springs(), refined, np.array([0, 1, 1, 2, 3, 4])).tolist() == [0, 0, 0, 2, 3, 4]


def test_what_cannot_be_refined_is_told():
    config = OmegaConf.create({"evaluation": {"batch_size": 8}})
    with pytest.raises(UserError, match="has no gradient"):
        require_base(TwoWells(load_system("checkerboard")))
    with pytest.raises(UserError, match="method=boltznce or tabg"):
        require_base(RoundModels(config, with_ebm=False).of(springs()))
    require_base(RoundModels(config).of(springs()))
    with pytest.raises(UserError, match="begins with likelihood=ebm"):
        require_base(RoundModels(config).of(springs()), "exact")
    assert settings_of(config) == (AnnealSettings(), FromProxy())
    config.evaluation.refine = {"n_walkers": 10, "cess": 0.8, "from_proxy": {"n_moves": 7}}
    assert settings_of(config) == (AnnealSettings(cess=0.8), FromProxy(n_moves=7))


def test_moves_of_a_molecule_are_in_its_units():
    kernel = kernel_of(aldp())
    masses = {atom.element.symbol: float(kernel.masses[atom.index]) for atom in aldp().topology.atoms}
    assert masses == pytest.approx({"H": 4.0, "C": 12.011, "N": 14.007, "O": 15.999}, abs=1e-3)
    assert (kernel.kT, kernel.centred) == (GAS_CONSTANT * 300.0, True)
    assert not kernel_of(load_system("double_well")).centred


# ---- by way of a proxy ----------------------------------------------------------------------------------------------


def dear():
    """Two narrow Gaussians, a tenth of it in the state, and a proxy that has them elsewhere, wider and as 2 to 3."""
    shape = {"name": "dear", "box": [[-3.0, 3.0], [-3.0, 3.0]], "state": ("x", (0.0, math.inf))}
    system = GaussianMixture(means=[[1.0, 0.2], [-1.2, 0.0]], std=0.2, weights=[0.1, 0.9], **shape)
    system.proxy = GaussianMixture(means=[[1.0, 0.0], [-1.0, 0.0]], std=0.3, weights=[0.4, 0.6], **shape)
    return system


EXACT = math.log(9.0)  # ΔF of `dear`


def asked(system, fail_at=None):
    """Numbers of points whose energies the system is asked for, one a call; all is lost at the ``fail_at``-th."""
    energy, calls = system.energy, []

    def counting(x):
        calls.append(len(x))
        if len(calls) == fail_at:
            raise KeyboardInterrupt
        return energy(x)

    system.energy = counting
    return calls


def test_two_legs_lead_by_way_of_the_proxy():
    generator = TwoWells(dear())
    draws = generator.draws(4000)
    np.testing.assert_allclose(draws.energy, generator.system.proxy.energy(draws.positions), rtol=1e-5)
    of_proxy, of_system = asked(generator.system.proxy), asked(generator.system)
    refined = refine(generator, draws, SETTINGS, seed=0)
    found = refined_free_energy_difference(
        refined.positions[:, 0, 0], refined.log_weights, refined.ancestors, (0.0, math.inf)
    )
    assert found.reliable, found
    assert abs(found.value - EXACT) < 3 * found.std_error < 0.3
    np.testing.assert_allclose(refined.energy, dear().energy(refined.positions), rtol=1e-4, atol=1e-4)
    assert refined.weights @ refined.positions[:, 0, 1] == pytest.approx(0.02, abs=0.02)
    done = refined.meta["refinement"]
    legs = [step["leg"] for step in done["steps"]]
    assert legs == sorted(legs)
    assert set(legs) == {"base", "proxy"}
    assert [step["beta"] for step in done["steps"]].count(1.0) == 2
    assert done["gradients"]["system"] == sum(of_system)
    assert done["gradients"]["proxy"] == sum(of_proxy)
    assert sum(of_system) < sum(of_proxy)


def test_a_refinement_that_was_killed_in_its_second_leg_goes_on(tmp_path):
    draws, generator = TwoWells(dear()).draws(300), TwoWells(dear())
    whole = refine(generator, draws, SETTINGS, seed=3)
    asked(generator.system, fail_at=30)
    with pytest.raises(KeyboardInterrupt):
        refine(generator, draws, SETTINGS, seed=3, folder=tmp_path / "refined")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".refined.annealing", ".refined.annealing1"]
    generator = TwoWells(dear())
    of_proxy, of_system = asked(generator.system.proxy), asked(generator.system)
    refined = refine(generator, draws, SETTINGS, seed=3, folder=tmp_path / "refined")
    for name in ("positions", "energy", "log_weights", "ancestors"):
        np.testing.assert_array_equal(getattr(refined, name), getattr(whole, name))
    assert refined.meta["refinement"]["gradients"] == whole.meta["refinement"]["gradients"]
    assert len(of_proxy) <= len(of_system) + 1  # as the base of the second leg, and no more in the first
    assert [path.name for path in tmp_path.iterdir()] == ["refined"]
    other = SETTINGS._replace(from_proxy=FromProxy())
    with pytest.raises(UserError, match="holds other samples"):
        refine(generator, draws, other, seed=3, folder=tmp_path / "refined")


def frames_of(system, folder, n=20000, n_walkers=40):
    """Exact draws of the proxy as if of many walkers, the state ten times too frequent."""
    x = system.proxy.sample(n, torch.Generator().manual_seed(0)).numpy()
    x = np.concatenate([x, np.repeat(x[x[:, 0, 0] > 0], 9, axis=0)])
    number = np.arange(len(x))
    meta = {"system": system.proxy.identity, "cpu_seconds": 100.0, "settings": {"method": "metadynamics"}}
    columns = {"time": number // n_walkers, "window": number % n_walkers, "repeat": number % 2}
    log_weights = np.where(x[:, 0, 0] > 0, -math.log(10), 0.0)
    return Dataset.write(folder, x, system.proxy.energy(x), log_weights=log_weights, meta=meta, **columns)


def test_frames_of_the_proxy_become_those_of_the_system(tmp_path):
    system, given = dear(), {"settings": SETTINGS.from_proxy, "seed": 0, "folder": tmp_path / "refined"}
    frames = frames_of(system, tmp_path / "frames")
    asked(system, fail_at=20)
    with pytest.raises(KeyboardInterrupt):
        refine_frames(system, frames, **given)
    system = dear()
    refined = refine_frames(system, frames, **given)
    whole = refine_frames(system, frames, **given | {"folder": tmp_path / "again"})
    for name in ("positions", "energies", "log_weights", "window", "repeat", "time"):
        np.testing.assert_array_equal(getattr(refined, name), getattr(whole, name))
    found = free_energy_difference(
        refined.positions[:, 0, 0], refined.log_weights, (0.0, math.inf), walkers=refined.window
    )
    assert abs(found.value - EXACT) < 3 * found.std_error < 0.4
    np.testing.assert_allclose(refined.energies, system.energy(np.array(refined.positions)), rtol=1e-4, atol=1e-4)
    assert (refined.repeat == refined.window % 2).all()
    assert np.exp(refined.log_weights).mean() == pytest.approx(1.0)
    assert refined.meta["system"] == system.identity
    assert refined.meta["refinement"]["gradients"]["system"] > 2000
    calls = asked(system)
    refine_frames(system, frames, **given)
    assert not calls
    with pytest.raises(UserError, match="holds other frames"):
        refine_frames(system, frames, **given | {"seed": 1})
    with pytest.raises(UserError, match="has no proxy"):
        refine_frames(system.proxy, frames, **given)


def test_a_shift_brings_a_proxy_to_its_system():
    """Another bond, angle, torsion and charge: all that the terms of the shift can tell; but not where atoms clash."""
    system, proxy = copy.copy(aldp()), aldp()

    def other(x):
        phi, psi = (proxy.dihedral(x, name) for name in ("phi", "psi"))
        bond, apart = (x[:, 4] - x[:, 5]).norm(dim=-1), (x[:, 0] - x[:, 20]).norm(dim=-1)
        return 2 * phi.cos() - (phi + 2 * psi).sin() + 3e3 * (bond - 0.14).square() + 2 / apart

    system.proxy, system.energy = proxy, lambda x: proxy.energy(x) + other(x)
    x = conformers().repeat(500, 1, 1)
    x = x + 0.004 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=x.dtype)
    given = x[:1500].clone()
    given[0, 20] = given[0, 0]  # 2 / apart is inf
    shift = shift_of(system, given)
    left = other(x[1500:]) - shift(x[1500:])
    assert left.std() < 0.2 * other(x[1500:]).std()
    x = x[:4].requires_grad_()
    wanted, found = (torch.autograd.grad(energy(x).sum(), x)[0] for energy in (other, shift))
    assert torch.nn.functional.cosine_similarity(wanted.flatten(), found.flatten(), dim=0) > 0.9
    assert (shift_of(dear(), torch.zeros(2, 1, 2))(torch.ones(3, 1, 2)) == 0).all()


def test_data_are_those_of_the_proxy(tmp_path):
    system = dear()
    x = draw_dataset(system, tmp_path / "drawn", 200).positions
    assert load_data(system, system, tmp_path / "drawn").meta["system"] == system.proxy.identity
    Dataset.write(tmp_path / "unnamed", x, system.proxy.energy(x))
    load_data(system, system, tmp_path / "unnamed")
    Dataset.write(tmp_path / "own", x, system.energy(x))
    with pytest.raises(UserError, match="another system"):
        load_data(system, system, tmp_path / "own")
    assert system.at_temperature(2.0).proxy.temperature == 2.0
    assert system.cheap is system.proxy
    assert system.proxy.cheap is system.proxy


# ---- in a run -------------------------------------------------------------------------------------------------------

WORDS = [*ROUND_WORDS, "evaluation.n_frames=200", "evaluation.frames=refined", "evaluation.n_correction=200"]
WORDS += ["evaluation.refine={n_walkers: 500, max_steps: 10, n_moves: 1, final_moves: 1, step_size: 0.0003}"]


@pytest.fixture(scope="module")
def refined_run(tmp_path_factory):
    """Evaluation and report of a run whose EBM errs by the conformer."""
    folder = tmp_path_factory.mktemp("refined")
    work = workspace(folder, WORDS, springs(), RoundModels)
    simulated(folder / "aldp-smoke", springs(), 4000)
    for name in ("flow", "samples", "ebm"):
        work.folder.mark_done(name, {"steps": 1})
    for name in ("evaluation", "report"):
        with work.folder.stage(name) as info:
            info.update(boltznce.STAGES[name](work))
    return work, json.loads((work.folder.path / "metrics.json").read_text())


def test_walkers_and_the_likelihoods_of_their_ancestors_are_on_disk(refined_run):
    work, _ = refined_run
    drawn = arrays(work.samples("weighted", work.system)).positions
    allowed = drawn[np.isin(nearest(drawn), [STATE, REST])]
    refined, exact = arrays(work.samples("refined", work.system)), arrays(work.samples("exact_weights", work.system))
    assert len(refined.positions) == 500
    np.testing.assert_array_equal(nearest(refined.positions), nearest(allowed[refined.ancestors]))  # nobody crossed
    index = np.unique(exact.subset)
    assert len(exact.subset) == 200
    np.testing.assert_array_equal(exact.positions, allowed[refined.ancestors[index]])
    np.testing.assert_array_equal(np.bincount(nearest(refined.positions[exact.subset])), [100, 100])
    assert len(np.unique(refined.ancestors[index])) == len(index)


def test_the_report_corrects_refined_walkers_by_their_ancestors(refined_run):
    """Of 200 draws in the state and 500 in the rest 200 and 300 are refined, which stand for all."""
    work, metrics = refined_run
    rows, exact = metrics["free_energy"], math.log(TARGET[REST] / TARGET[STATE])
    refined = arrays(work.samples("refined", work.system))
    counts = {STATE: 200, REST: 300}
    lie = EBM_ERROR[STATE] - EBM_ERROR[REST]
    assert rows["refined"]["value"] == pytest.approx(exact + lie, abs=2e-3)
    assert rows["corrected"]["value"] == pytest.approx(exact, abs=2e-3)
    assert rows["corrected"]["correction_state"] == pytest.approx(EBM_ERROR[STATE] + EBM_CONSTANT, abs=1e-3)
    error = math.sqrt(sum(1 / n for n in counts.values()))
    assert rows["refined"]["std_error"] == pytest.approx(error, rel=0.1)
    assert rows["corrected"]["std_error"] == pytest.approx(error, rel=0.1)
    assert not rows["refined"]["reliable"]
    assert "the EBM is off by 1.0" in rows["refined"]["message"]
    assert rows["corrected"]["reliable"]
    assert metrics["ebm_bias"]["refined"]["value"] == pytest.approx(lie, abs=2e-3)
    assert metrics["total"] == ["two_sided", "corrected", "exact"]
    assert metrics["weighted"] == "corrected"
    lines = metrics["refinement"]["lineages"]
    assert {name: line["walkers"] for name, line in lines.items()} == {"state": counts[STATE], "rest": counts[REST]}
    assert {name: line["ancestors"] for name, line in lines.items()} == {
        name: len(np.unique(refined.ancestors[nearest(refined.positions) == which]))
        for name, which in (("state", STATE), ("rest", REST))
    }
    columns = {"unweighted", "weighted", "refined", "rebalanced", "floor"}
    assert set(metrics["distances"]["E-W2 (kT)"]) == columns
    assert metrics["mean_energy"]["refined"]["value"] == pytest.approx(refined.energy.mean(), abs=1.0)
    report = (work.folder.path / "report.md").read_text()
    for words in ("## Refinement", "## Ancestors of the refined samples", "| refined |"):
        assert words in report


def test_refined_walkers_are_the_other_side_of_the_draws(refined_run):
    """They are wrong in how many are in the state, which does not enter, and right within it."""
    work, metrics = refined_run
    refined, exact = arrays(work.samples("refined", work.system)), arrays(work.samples("exact_frames", work.system))
    np.testing.assert_array_equal(exact.positions, refined.positions[np.unique(exact.subset)])
    np.testing.assert_array_equal(np.bincount(nearest(refined.positions[exact.subset])), [100, 100])
    row = metrics["free_energy"]["two_sided"]
    assert row["value"] == pytest.approx(math.log(TARGET[REST] / TARGET[STATE]), abs=2e-3)
    assert row["reliable"]
    assert row["missed_state"] == row["missed_rest"] == 0
    assert row["seen_state"] <= 100
    assert "Of the refined walkers, 0.0% in the state" in (work.folder.path / "report.md").read_text()


def test_a_run_draws_refined_samples(tmp_path):
    few = ["hot.fit.steps=2", "annealing.n_steps=1", "annealing.fit.steps=2", "annealing.n_draws=100"]
    few += ["evaluation={n_samples: 200, n_ladder: 100, n_reference: 200, n_bootstrap: 20, n_torus: 50}"]
    run = train_run(tmp_path / "run", "system=double_well", "method=tabg", "budget=smoke", *few)
    assert "refined" in run.metrics["free_energy"]
    assert "refined" in run.metrics["total"]  # its likelihood is exact
    refined = run.sample(50, refine=True, folder=tmp_path / "mine")
    assert len(refined) == 50
    assert refined.ancestors is not None
    places = sorted(path.name for path in tmp_path.iterdir() if path.name.startswith("mine"))
    assert places == ["mine", "mine-refined"]
    assert refined_folder(tmp_path / "mine") == tmp_path / "mine-refined"
    np.testing.assert_array_equal(run.sample(50, refine=True).positions, refined.positions)
    np.testing.assert_array_equal(load_run(tmp_path / "run").sample(50).positions, run.sample(50).positions)
    table = write_free_energy(run.system, tmp_path / "mine-refined", tmp_path / "free_energy", n_bins=20)
    assert "refined" in table
    row = json.loads((tmp_path / "free_energy" / "metrics.json").read_text())["free_energy"]["refined"]
    values = run.system.coordinate(refined.positions, "x")
    by_hand = refined_free_energy_difference(values, refined.log_weights, refined.ancestors, run.system.state.interval)
    assert row["value"] == pytest.approx(by_hand.value)
    assert row["std_error"] == pytest.approx(by_hand.std_error)
    with pytest.raises(UserError, match="leave one of likelihood and refine out"):
        run.sample(50, "none", refine=True)


def test_a_report_of_a_system_with_a_proxy(tmp_path):
    """Springs whose populations are others than those of their proxy's, which flow and data are of."""
    target = (0.4, 0.5, 0.04, 0.06)
    system = copy.copy(springs("springs", target))
    system.proxy = springs()
    few = "max_steps: 5, n_moves: 1, final_moves: 1, step_size: 0.0003"
    words = [
        *WORDS[:-1],
        f"evaluation.refine={{n_walkers: 500, {few}, from_proxy: {{{few}, n_walkers: 400, n_fit: 100}}}}",
    ]
    work = workspace(tmp_path, words, system, RoundModels)
    simulated(tmp_path / "aldp-smoke", springs(), 4000)
    for name in ("data", "flow", "samples", "ebm"):
        work.folder.mark_done(name, {"steps": 1})
    for name in ("evaluation", "report"):
        with work.folder.stage(name) as info:
            info.update(boltznce.STAGES[name](work))
    metrics = json.loads((work.folder.path / "metrics.json").read_text())
    rows = metrics["free_energy"]
    exact, of_data = math.log(target[REST] / target[STATE]), "data (MD), error not estimated"
    assert set(rows) == {"refined", "corrected", "unweighted", of_data}
    assert metrics["total"] == ["corrected"]
    assert abs(rows["corrected"]["value"] - exact) < 3 * rows["corrected"]["std_error"] < 0.5
    assert rows[of_data]["value"] == pytest.approx(exact, abs=0.2)
    assert set(metrics["mean_energy"]) == {"refined", "MD"}
    assert set(metrics["distances"]["E-W2 (kT)"]) == {"refined", "floor"}
    assert {"base", "proxy", "system"} == {
        what.split()[-1] for what in metrics["counts"] if what.startswith("refinement, gradients")
    }
    report = (work.folder.path / "report.md").read_text()
    assert "those of the proxy (amber99sbildn.xml + amber99_obc.xml + NoCutoff)" in report
    with pytest.raises(UserError, match="Only refinement leads from the proxy"):
        check_refinement(compose("train", ["system=aldp", "evaluation.refine=null"]), system)


def test_the_figure_has_every_leg_to_its_end():
    steps = [
        {"beta": beta, "ess": 0.5, "ancestors": 8, "acceptance": 0.9, "resampled": 0, "mean_u": u}
        for beta, u in ((0.4, 7.0), (1.0, 5.0), (0.5, 103.0), (1.0, 101.0))
    ]
    left, right = plot_refinement(steps, 10).axes
    assert [len(line.get_xdata()) for line in left.get_lines()] == [4, 4, 4]
    np.testing.assert_allclose(right.get_lines()[0].get_xydata(), [[0.4, 2], [1, 0], [1.5, 2], [2, 0]])
