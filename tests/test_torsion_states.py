"""States by every φ: ΔF of each and populations of their patterns, of draws and walkers that are known."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from omegaconf import OmegaConf

from boltznce import WeightedSamples
from boltznce.analysis.report import write_report
from boltznce.data.dataset import Dataset
from boltznce.methods.findings import Data, ExactSubset, Findings
from boltznce.methods.torsion_states import of_each_phi, rebalanced
from boltznce.states import State, patterns

WORDS = np.array(["---", "+--", "-+-", "--+", "++-"])
TARGET, FLOW = np.array([0.80, 0.08, 0.06, 0.03, 0.03]), np.array([0.3, 0.3, 0.1, 0.1, 0.2])
SYSTEM = SimpleNamespace(
    state=State("phi", (0.0, 2.0)),
    dihedrals={name: (0, 1, 2, 3) for name in ("phi", "psi", "phi2", "phi3", "omega")},
    proxy=None,
    exact=False,
    reference=lambda: None,
)
SYSTEM.coordinate = lambda x, name: x[:, ("phi", "phi2", "phi3").index(name), 0]
SYSTEM.in_state = lambda x: SYSTEM.state.contains(SYSTEM.coordinate(x, "phi"))


def of_words(which):
    """Positions in the patterns of these numbers, (n, 3, 1)."""
    return np.array([[[1.0 if sign == "+" else -1.0] for sign in word] for word in WORDS])[which]


def chosen(rng, which, weights, n):
    """Half of them in the state of the first φ, by weight."""
    inside = np.isin(which, [1, 4])
    sides = [np.flatnonzero(side) for side in (inside, ~inside)]
    return np.concatenate([rng.choice(side, n // 2, p=weights[side] / weights[side].sum()) for side in sides])


@pytest.fixture(scope="module")
def found():
    """Draws of a flow with an EBM that is wrong in one pattern, walkers refined by it, exact likelihoods of some."""
    rng, n = np.random.default_rng(0), 20_000
    which, noise = rng.choice(5, n, p=FLOW), rng.normal(0.0, 0.3, (2, n))
    wrong = np.array([0.0, 0.0, 0.0, -1.5, 0.0])
    x, u = of_words(which), -np.log(TARGET)[which] + noise[0]
    exact = np.log(FLOW)[which] - noise[0] + noise[1] + 0.3**2 / 2  # so that weights have their mean
    draws = WeightedSamples(x, u, exact + wrong[which], meta={"likelihood": "ebm", "counts": {"drawn": n}})
    uniform = np.unique(chosen(rng, which, np.ones(n), 3000))
    biased = TARGET * np.exp(-wrong)
    walks = rng.choice(5, 4000, p=biased / biased.sum())
    shift = rng.normal(0.0, 0.3, 4000) - 0.3**2 / 2  # of u + log q, among what follows the target
    energy, nan = -np.log(TARGET)[walks], np.full(4000, np.nan)
    walkers = WeightedSamples(of_words(walks), energy, nan, np.zeros(4000), None, {}, np.arange(4000) // 2)
    index = np.sort(chosen(rng, walks, np.ones(4000), 3000))
    log_q = np.log(FLOW)[walks] + shift
    subsets = {"uniform": ExactSubset(uniform, exact[uniform]), "frames": ExactSubset(index, log_q[index])}
    settings = OmegaConf.create({"n_bootstrap": 50, "frames": "refined"})
    parts = (draws, {}, draws, None, subsets, None, {"draw": 1e-3}, settings, 0)
    return Findings(SYSTEM, [], *parts, refined=walkers)


def near(row, known):
    return abs(row.value - known) < 4 * row.std_error < 0.6


def test_every_phi_and_pattern_has_its_known_value(found):
    results = of_each_phi(found)
    assert (results["coordinate"], list(results["others"])) == ("phi", ["phi2", "phi3"])
    for name, p in (("phi2", 0.09), ("phi3", 0.03)):
        rows = results["others"][name]
        assert set(rows) == {"ebm", "refined", "two_sided"}
        assert near(rows["two_sided"], np.log(1 / p - 1))
        assert rows["two_sided"].reliable
    off = results["others"]["phi3"]["refined"]
    assert off.value < np.log(1 / 0.03 - 1) - 1.0
    assert "the EBM is off by -1." in off.message
    assert set(results["populations"]) == set(WORDS)
    for word, p in zip(WORDS, TARGET, strict=True):
        row = results["populations"][word]["two_sided"]
        assert row.reliable
        assert near(row, p)
        assert row.interval[0] < row.value < row.interval[1]
    assert sum(rows["two_sided"].value for rows in results["populations"].values()) == pytest.approx(1)
    assert not results["populations"]["--+"]["ebm"].reliable


def test_the_reference_stands_beside_them_where_it_has_the_same_coordinates(found):
    entry = {"value": 0.031, "std_error": 0.002}
    reference = {
        "others": {"phi2": {"value": 2.4, "std_error": 0.1}},
        "populations": {"--+": entry, "+++": {"value": 0.02, "std_error": 0.002}},
        "made_by": {"bias_along": [["phi", "psi"], ["phi2", "psi2"], ["phi3", "psi3"]]},
    }
    results = of_each_phi(replace(found, reference=reference))
    assert results["others"]["phi2"]["reference"] == {
        "value": 2.4,
        "std_error": 0.1,
        "interval": (pytest.approx(2.204), pytest.approx(2.596)),
    }
    assert "reference" not in results["others"]["phi3"]
    assert results["populations"]["--+"]["reference"]["value"] == 0.031
    lacking = results["populations"]["+++"]  # of which nobody was drawn
    assert (lacking["ebm"].value, lacking["refined"].value) == (0.0, 0.0)
    assert np.isnan(lacking["two_sided"].value)
    assert not any(row.reliable for name, row in lacking.items() if name != "reference")
    reference["made_by"]["bias_along"] = [["phi", "psi"], ["phi2", "psi2"]]
    assert "+++" not in of_each_phi(replace(found, reference=reference))["populations"]


def test_data_whose_errors_are_known_are_the_reference_of_none(found):
    rng, n = np.random.default_rng(1), 3000
    which, order = rng.choice(5, n, p=TARGET), np.arange(n)
    meta = {"cpu_seconds": 1.0, "settings": {"method": "metadynamics"}}
    frames = Dataset(of_words(which), 0.0 * order, 0.0 * order, order // 50, order % 50, 0 * order, None, meta)
    results = of_each_phi(replace(found, data=Data(frames, frames, frames, {}, frames.log_weights)))
    assert near(results["others"]["phi2"]["reference"], np.log(1 / 0.09 - 1))
    assert near(results["populations"]["+--"]["reference"], 0.08)


def test_one_phi_or_another_state_has_none(found):
    one = SimpleNamespace(**vars(SYSTEM) | {"dihedrals": {"phi": (0, 1, 2, 3), "psi": (1, 2, 3, 4)}})
    other = SimpleNamespace(**vars(SYSTEM) | {"state": State("psi", (0.0, 2.0))})
    stateless = SimpleNamespace(**vars(SYSTEM) | {"state": None})
    assert [of_each_phi(replace(found, system=system)) for system in (one, other, stateless)] == [{}] * 3


def test_regions_of_refined_walkers_are_rebalanced(found):
    """The EBM is wrong in one region of three: by weight its walkers are, and by BAR no more."""
    one = SimpleNamespace(**vars(SYSTEM) | {"dihedrals": {"phi": (0, 1, 2, 3), "psi": (1, 2, 3, 4)}})
    columns = {"phi": 0, "psi": 2}  # so that --+ alone is β
    one.coordinate = lambda x, name: x[:, columns[name], 0]
    log_weights = rebalanced(replace(found, system=one))
    weights, was = np.exp(log_weights) / np.exp(log_weights).sum(), found.refined.weights
    x = found.refined.positions[:, :, 0]
    beta, state = (x[:, 0] < 0) & (x[:, 2] > 0), x[:, 0] > 0
    assert was[beta].sum() > 0.09
    assert weights[beta].sum() == pytest.approx(0.03, abs=0.006)
    assert weights[state].sum() == pytest.approx(0.11, abs=0.02)
    assert np.ptp(log_weights[beta]) < 1e-9  # within a region nothing changes
    few = {name: ExactSubset(subset.index[::40], subset.log_prob[::40]) for name, subset in found.subsets.items()}
    assert rebalanced(replace(found, system=one, subsets=few)) is None
    assert rebalanced(replace(found, system=one, refined=None)) is None
    assert rebalanced(replace(found, system=one, subsets={})) is None
    more = one.dihedrals | {"phi2": (5, 6, 7, 8), "psi2": (6, 7, 8, 9)}
    assert rebalanced(replace(found, system=SimpleNamespace(**vars(one) | {"dihedrals": more}))) is None


def test_the_report_has_a_table_of_each(found, tmp_path):
    results = of_each_phi(found) | {"system": "three", "free_energy": {"ebm": {"value": 2.1, "interval": (2.0, 2.2)}}}
    text = write_report(tmp_path, results, {}).read_text(encoding="utf-8")
    assert "## Free-energy difference of each φ" in text
    lines = [line.split(" | ") for line in text.splitlines()]
    assert ["| φ", "2.10 [2.00, 2.20]", "–", "– |"] in lines
    (row,) = [line for line in lines if line[0] == "| −−+"]
    assert row[1].endswith("not reliable")
    assert row[3].startswith("3.") or row[3].startswith("2.")
    members = write_report(tmp_path / "two", {"members": {"A": results}}, {}).read_text(encoding="utf-8")
    assert "| A | φ2 |" in members


def test_patterns():
    assert patterns([[True, True, False], [False, True, True]]).tolist() == ["+-", "++", "-+"]
