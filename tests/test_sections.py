"""Sections of a report where something is missing: a reference, data, a state."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from boltznce import WeightedSamples, load_system
from boltznce.data.dataset import Dataset
from boltznce.methods import findings, ladder, sections
from boltznce.methods.findings import Data, ExactSubset, Findings
from boltznce.methods.views import views_of
from boltznce.states import in_interval


@pytest.fixture(scope="module")
def found():
    """Exact draws of a double well with exact likelihoods, and weighted data that no reference stands beside."""
    system, generator = load_system("double_well"), torch.Generator().manual_seed(0)
    x, frames = system.sample(400, generator), system.sample(300, generator)
    meta = {"likelihood": "exact", "counts": {"drawn": 400}}
    drawn = WeightedSamples(x.numpy(), system.energy(x).double().numpy(), system.log_prob(x).numpy(), meta=meta)
    tilt, order = -0.3 * frames[:, 0, 0].double().numpy(), np.arange(300)
    data = Dataset(frames.numpy(), system.energy(frames).double().numpy(), tilt, order, 0 * order, order % 2, None, {})
    settings = OmegaConf.create({"n_bootstrap": 20, "n_torus": 50, "tica_lag": None})
    parts = (Data(data, data, data, {}, tilt), {}, None, {"draw": 1e-3}, settings, 0)
    return Findings(system, views_of(system), drawn, {}, drawn, *parts)


def test_without_a_reference_the_data_have_their_row(found):
    assert "reference" not in (rows := sections.free_energies(found).results["free_energy"])
    frames = found.data.whole
    weights, inside = np.exp(frames.log_weights), found.system.state.contains(frames.positions[:, 0, 0])
    expected = np.log(weights[~inside].sum() / weights[inside].sum())
    assert rows["data (data), error not estimated"] == {"value": pytest.approx(expected)}
    assert np.isnan(sections.free_energies(found).results["error"])
    known = replace(found, reference=found.system.reference())
    results = sections.free_energies(known).results
    assert results["state"] == "x > 0"
    assert {"reference", "exact", "data (data), error not estimated"} <= set(results["free_energy"])
    meta = {"cpu_seconds": 1.0, "settings": {"method": "metadynamics"}}
    walkers = replace(known.data.whole, window=np.arange(300) % 30, meta=meta)
    moved = replace(known, data=replace(known.data, whole=walkers, frames=walkers))
    row = sections.free_energies(moved).results["free_energy"]["data (data)"]
    assert row.value == pytest.approx(expected)
    assert 0.05 < row.std_error < 0.3


def test_without_data_or_a_state_sections_are_shorter(found):
    alone = replace(found, data=None)
    assert "data (data), error not estimated" not in sections.free_energies(alone).results["free_energy"]
    for section in sections.COMMON:
        section(alone)
    system = load_system("double_well")
    system.state = None
    stateless = replace(found, system=system)
    for section in set(sections.COMMON) - {sections.mode_weights}:  # whose modes are the two sides of the state
        assert "free_energy" not in section(stateless).results
    assert sections.costs(stateless).results == {"timing": {"draw_per_sample": 1e-3}}


def test_the_surface_of_the_reference_stands_beside_the_datas():
    """With the populations of its profile; for the view over its coordinates alone."""
    system = load_system("aldp")
    (view,), reference = views_of(system), system.reference()
    found = SimpleNamespace(reference=reference, data_name="MD")
    panels = {"MD": None, "flow": None}
    more = sections._with_reference(found, view, panels)
    assert list(more) == ["MD", "reference", "flow"]
    density = np.nan_to_num(np.exp(-more["reference"]))
    assert density.sum() == pytest.approx(1)
    phi = (np.arange(len(density)) + 0.5) * 2 * np.pi / len(density) - np.pi
    inside = in_interval(phi, system.state.interval)
    ours = np.log(density[~inside].sum() / density[inside].sum())
    assert ours == pytest.approx(reference["delta_f"]["value"], abs=0.05)
    other = replace(view, symbols=("φ2", "ψ2"))
    assert sections._with_reference(found, other, panels) is panels
    assert sections._with_reference(SimpleNamespace(reference=None), view, panels) is panels


def test_the_two_sided_row_is_that_of_exact_likelihoods_of_both_sides(found):
    """Here of an exact flow: ΔF is that of its populations, and the frames add nothing but noise."""
    assert "two_sided" not in sections.free_energies(found).results["free_energy"]
    frames = found.data.frames
    log_prob = found.system.log_prob(torch.from_numpy(frames.positions)).numpy()
    index = np.arange(0, 300, 2).repeat(2)
    for more in (
        {"frames_log_prob": log_prob},
        {"subsets": {"frames": ExactSubset(index, log_prob[index])}},
    ):
        known = replace(found, **more)
        part = sections.free_energies(known)
        row = part.results["free_energy"]["two_sided"]
        assert row.value == pytest.approx(part.results["free_energy"]["unweighted"].value, abs=1e-4)
        assert row.std_error == pytest.approx(part.results["free_energy"]["unweighted"].std_error, rel=0.3)
        assert row.missed_state == row.missed_rest == 0
        assert "Of the data that no flow was trained on, 0.0% in the state" in part.notes[0]
    assert row.n_state + row.n_rest == 400 + 150
    walkers = replace(
        found.samples[np.argsort(found.samples.positions[:, 0, 0])[::2]], ancestors=np.arange(200) // 2
    )  # two of each, alike
    subsets = {"frames": ExactSubset(np.arange(200), walkers.log_prob)}
    settings = OmegaConf.merge(found.settings, {"frames": "refined"})
    refined = replace(found, refined=walkers, subsets=subsets, settings=settings, data=None)
    part = sections.free_energies(refined)
    row = part.results["free_energy"]["two_sided"]
    assert row.value == pytest.approx(part.results["free_energy"]["unweighted"].value, abs=1e-4)
    assert (row.n_state + row.n_rest, row.seen_state + row.seen_rest) == (400 + 200, pytest.approx(100, abs=2))
    assert any("Of the refined walkers, 0.0% in the state" in note for note in part.notes)
    one_side = replace(found.data, frames=frames.take(~found.system.state.contains(frames.positions[:, 0, 0])))
    assert replace(known, data=one_side, frames_log_prob=np.zeros(len(one_side.frames))).sides is None


def test_mean_energies_are_weighted_and_their_errors_counted_by_groups(found):
    row = sections.mean_energies(found).results["mean_energy"]
    u, weights = found.samples.energy, found.samples.weights
    mean = (weights * u).sum()
    error = np.sqrt((weights**2 * (u - mean) ** 2).sum() * len(u) / (len(u) - 1))
    assert row["weighted samples"] == {"value": pytest.approx(mean), "std_error": pytest.approx(error)}
    assert row["weighted samples"]["value"] == pytest.approx(row["data"]["value"], abs=0.4)
    lost = replace(found.samples, energy=np.append(u[:-1], np.inf), log_weights=np.append(0 * u[:-1], -np.inf))
    row = sections.mean_energies(replace(found, samples=lost)).results["mean_energy"]
    assert row["weighted samples"]["value"] == pytest.approx(u[:-1].mean())


def test_what_of_the_frames_is_independent(found, monkeypatch):
    def n_groups(**changed):
        data = replace(found.data, frames=replace(found.data.frames, **changed))
        return len(np.unique(replace(found, data=data).frame_groups))

    monkeypatch.setattr(findings, "N_GROUPS", 40)
    assert n_groups() == 300  # exact draws
    assert n_groups(meta={"cpu_seconds": 1.0}) == 40  # two trajectories of 20 blocks
    assert n_groups(meta={"cpu_seconds": 1.0}, window=np.arange(300) % 50, repeat=np.zeros(300)) == 50


def test_a_ladder_loses_no_flow_of_a_temperature_that_comes_again(found):
    step = {"pareto_k": 0.1, "n_draws": 7, "ess_clipped": 0.5}
    steps = tuple(step | {"drawn_at": 4.0, "weighted_to": cold, "ess": ess} for cold, ess in ((4.0, 0.5), (4.0, 0.6)))
    flows = tuple((4.0, found.drawn[np.arange(n)]) for n in (300, 200))
    rows = ladder.ladder(replace(found, flows=flows, steps=steps)).results["ess"]
    named = [f"flow of 4{again}, at its own temperature" for again in ("", " (2)")]
    assert [rows[name]["n"] for name in named] == [300, 200]
    assert [rows[f"ladder, 4 to 4{again}"]["ess"] for again in ("", " (2)")] == [0.5, 0.6]
