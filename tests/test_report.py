import json

import numpy as np
import pytest
from matplotlib.figure import Figure

from boltznce.analysis import plotting
from boltznce.analysis.free_energy import free_energy_difference
from boltznce.analysis.headline import Headline
from boltznce.analysis.metrics import HeldOutLikelihood, SampledDistance, likelihood_agreement
from boltznce.analysis.profiles import free_energy_profile
from boltznce.analysis.report import summary_table, write_report


@pytest.fixture
def results():
    generator = np.random.default_rng(0)
    angle = generator.uniform(-np.pi, np.pi, size=500)
    exact = generator.normal(size=50)
    difference = free_energy_difference(angle, n_bootstrap=50)
    return {
        "system": "aldp",
        "method": "boltznce",
        "budget": "smoke",
        "settings": {"flow.lr": 1e-3, "ebm": "a|b"},
        "state": "0 < φ < 2 rad",
        "free_energy": {
            "reference": {"value": 1.5, "std_error": 0.06, "interval": (1.38, 1.62)},
            "ebm": difference,
            "corrected": {
                "value": 2.25,
                "std_error": 9.0,
                "interval": (1.111, 99.0),
                "reliable": False,
                "message": "too few",
            },
            "exact": free_energy_difference(np.full(5, -1.0)),
        },
        "ess": {"EBM": {"ess": np.float64(0.0123), "pareto_k": float("-inf"), "n": 500}},
        "distances": {
            "E-W2 (kT)": {"unweighted": 5.0, "weighted": 2.0, "floor": 1.0},
            "T-W2 (rad)": {"unweighted": SampledDistance(0.8, 0.01, 500), "weighted": SampledDistance(0.3, 0.01, 500)},
        },
        "held_out": {
            "flow at 300": HeldOutLikelihood(nll=-183.25, std_error=0.125, n=900, n_outside=3, share_outside=0.002)
        },
        "excluded": {"peptide bond turned": {"n": 12, "by_count": 0.03, "by_weight": 0.0005, "data": 0.0}},
        "modes": {"exact": [0.5, 0.5, 0.0], "flow": [0.4, 0.59, 0.01]},
        "energy_cut": {"cut": 20.0, "shares": {"MD": 0.0, "flow": 0.25}},
        "likelihood": likelihood_agreement(exact + generator.normal(size=50), exact, n_bootstrap=50),
        "timing": {"ebm_per_sample": 0.0005, "exact_per_sample": 0.1, "stages": {"train flow": 300.0}},
        "counts": {"drawn": np.int64(500)},
        "notes": ["The first note."],
    }


def test_report(tmp_path, results):
    figure = plotting.plot_weights({"EBM": np.random.default_rng(0).normal(size=200)})
    path = write_report(tmp_path, results, {"weights": figure})
    metrics = json.loads(
        (tmp_path / "metrics.json").read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON")
    )
    assert metrics["ess"]["EBM"] == {"ess": 0.0123, "pareto_k": None, "n": 500}
    assert metrics["free_energy"]["exact"]["value"] is None
    assert metrics["free_energy"]["corrected"]["interval"] == [1.111, 99.0]
    text = path.read_text()
    for expected in (
        "0 < φ < 2 rad",
        "not reliable",
        "too few",
        "∞",
        "+0.75",
        "200 times",
        "The first note.",
        "(figures/weights.png)",
        "a\\|b",
    ):
        assert expected in text
    assert "1.11" not in text
    assert "| flow at 300 | -183.250 ± 0.125 | 900 | 3 | 0.200% |" in text
    assert "| peptide bond turned | 12 | 3.0000% | 0.0500% | 0.0000% |" in text
    assert "| largest relative error |  | 20.0% |" in text
    assert "| E-W2 (kT) | 5.000 | 2.000 | 1.000 | 0.25 |" in text
    assert "0.800 ± 0.010" in text
    assert (tmp_path / "figures" / "weights.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["figures", "metrics.json", "report.md"]
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert all(line.endswith("|") for line in tables)


def member(ours, simulation, **distances):
    return {
        "made": {"right_graph": 0.9, "kept": 0.8, "mirrored": 0.4, "reordered": 0.1, "turned": 0.0},
        "ess": {"EBM weights": {"ess": 0.05, "pareto_k": 0.4}, "exact weights": {"ess": 0.5, "pareto_k": 0.1}},
        "weighted": "weighted samples",
        "free_energy": {"weighted samples": ours, "reference": simulation},
        "error": float("nan"),
        "distances": {"E-W2 (kT)": {"unweighted": 5.0, "weighted": 2.0, "floor": 1.0} | distances, "T-W2 (rad)": {}},
    }


def test_members_say_in_words_what_is_not_known(tmp_path):
    generator = np.random.default_rng(0)
    angle = generator.uniform(-np.pi, np.pi, size=2000)
    sets = (angle, np.append(angle[angle < 0], [1.0] * 5), np.full(50, -1.0))
    fine, few, none = (free_energy_difference(a, n_bootstrap=50) for a in sets)
    members = {
        "AC": member(fine, fine),
        "CA": member(few, fine),
        "SV": member(fine, none, weighted=float("nan"), missing="no weighted sample below the cut"),
    }
    text = write_report(tmp_path, {"members": members}, {}).read_text()
    overview = text.split("## Free-energy")[0]
    table = {
        cells[1]: cells
        for cells in ([c.strip() for c in line.split("|")] for line in overview.splitlines() if line[:1] == "|")
    }
    interval = f"{fine.value:.2f} [{fine.interval[0]:.2f}, {fine.interval[1]:.2f}]"
    assert table["AC"][2:6] == ["90.0%", "80.0%", "5.00%", "0.40"]
    assert table["AC"][6:9] == [interval, interval, "–"]
    assert table["CA"][6] == f"{few.value:.2f} not reliable"
    assert table["SV"][6:10] == [interval, "not visited", "–", "5.00 → – (1.00)"]
    assert f"- CA, ΔF of the weighted samples: {few.message}." in text
    assert f"- SV, ΔF of the reference: {none.message}." in text
    assert "- SV, E-W2 (kT): no weighted sample below the cut." in text
    # each section shows the rows of a single molecule, with the name before them
    assert "| AC | exact weights | 50.000% | 0.10 | – |" in text
    assert "| CA | 90.00% | 80.00% | 40.00% | 10.00% | 0.00% |" in text
    # a report that was read back has None where there was infinity
    again = write_report(tmp_path, json.loads((tmp_path / "metrics.json").read_text()), {}).read_text()
    assert "not visited" in again


def test_the_result_comes_first(tmp_path, results):
    """One row with all that it has to be read with; or why there is none."""
    rows = results["free_energy"] | {"two_sided": {"value": 1.3, "std_error": 0.1, "interval": (1.1, 1.5)}}
    given = {"temperature": "300 K", "energy": "amber99sbildn.xml", "seed": "7", "data": "a folder", "solver": "heun"}
    energies = {"weighted samples": {"value": -20.0, "std_error": 0.5}, "MD": {"value": -23.0, "std_error": np.nan}}
    results |= {"free_energy": rows, "settings": given, "mean_energy": energies, "headline": Headline("two_sided")}
    first = write_report(tmp_path, results, {}).read_text().split("## Free-energy")[0]
    for expected in (
        "**ΔF = 1.30 ± 0.10 kT**, 95% interval [1.10, 1.50]: two-sided estimate (BAR)",
        "-0.20 from the reference.",
        "- ⟨u⟩ = -20.00 ± 0.50 kT (weighted samples), -23.00 kT (MD, not reliable).",
        "- Of temperature 300 K; energy amber99sbildn.xml; seed 7; data a folder.",
    ):
        assert expected in first
    assert "ΔF = 1.30 ± 0.10 kT" in summary_table(results)
    for none, why in (
        (Headline(), "none has a total error and is reliable"),
        (
            Headline(apart=("two_sided", "exact")),
            "by exact likelihoods and exact weights are more than three joint standard errors",
        ),
    ):
        text = write_report(tmp_path, results | {"headline": none}, {}).read_text()
        assert "**No ΔF of this run can be relied on**" in text
        assert why in text
    text = write_report(tmp_path, {"members": {"AC": results}, "settings": given}, {}).read_text()
    assert "- AC: **ΔF = 1.30 ± 0.10 kT**" in text
    assert text.count("seed 7") == 1


def test_a_member_alone_has_the_same_rows(tmp_path):
    angle = np.random.default_rng(0).uniform(-np.pi, np.pi, size=2000)
    one = member(*[free_energy_difference(angle, n_bootstrap=50)] * 2)
    alone = write_report(tmp_path, one, {}).read_text()
    among = write_report(tmp_path, {"members": {"AC": one}}, {}).read_text()
    assert "molecule" not in alone
    tables = [line for line in alone.splitlines() if line.startswith("|") and "---" not in line]
    headers = [line for line in tables if f"| molecule {line}" in among]
    assert len(headers) == 4
    assert all(f"| AC {line}" in among for line in tables if line not in headers)


def test_captions_of_a_molecules_figures(tmp_path):
    figure = plotting.plot_weights({"EBM": np.random.default_rng(0).normal(size=200)})
    text = write_report(tmp_path, {}, dict.fromkeys(("AC_weights", "AC_tica"), figure), {"tica": "Slow."}).read_text()
    assert "*AC: Distribution of the log weights.*" in text
    assert "*AC: Slow.*" in text


def test_summary_table(results):
    text = summary_table(results)
    assert text.startswith("aldp · boltznce · smoke")
    assert "1.50" in text
    assert "not reliable" in text
    assert "nan" not in text


@pytest.mark.parametrize("kept", [(), ("system",), ("ess", "notes"), ("free_energy",)])
def test_missing_sections_are_left_out(tmp_path, results, kept):
    part = {key: results[key] for key in kept}
    text = write_report(tmp_path, part, {}).read_text()
    assert ("## Weights" in text) == ("ess" in kept)
    assert ("## Free-energy" in text) == ("free_energy" in kept)
    assert "## Figures" not in text
    assert isinstance(summary_table(part), str)


def figures():
    generator = np.random.default_rng(0)
    angles = generator.uniform(-np.pi, np.pi, size=(300, 2))
    log_weights = generator.normal(size=300)
    exact = generator.normal(size=30)
    steps = np.arange(300)
    yield plotting.plot_ramachandran({"MD": (angles, None), "weighted": (angles, log_weights)}), 3
    yield (
        plotting.plot_ramachandran({str(t): (angles, None) for t in range(7)}, angle_names=("φ2", "ψ2"), zero_of="6"),
        9,
    )
    yield plotting.plot_plane({"draws": (angles, None)}, ((-4.0, 4.0), (-4.0, 4.0))), 2
    yield plotting.plot_marginals({"MD": (angles, None), "flow, weighted": (angles, log_weights)}), 2
    yield (
        plotting.plot_ladder(
            [4.0, 2.0, 1.0, 1.0], {"own": [0.9, 0.8, 0.7, 0.8], "weighted": [np.nan, 0.5, 0.6, 0.8]}, ""
        ),
        1,
    )
    yield plotting.plot_ladder([2.0, 1.0], {"own": [1e-4, 2e-3], "weighted": [np.nan, 1e-5]}, ""), 1
    yield (
        plotting.plot_energy_histograms({"MD": (log_weights, None), "flow": (np.append(log_weights, np.inf), None)}),
        1,
    )
    yield plotting.plot_profiles({"EBM": free_energy_profile(angles[:, 0], log_weights, n_bins=20, n_bootstrap=20)}), 1
    yield plotting.plot_likelihood_agreement(exact + 1.0, exact, exact > 0.0), 1
    yield (
        plotting.plot_learning_curves(
            {"flow/train": (steps, np.exp(-steps / 50)), "ebm/train": (steps, np.where(steps % 2, 1.0, np.nan))}
        ),
        2,
    )
    yield plotting.plot_weights({"EBM": log_weights, "equal": np.zeros(300)}), 1


def test_a_profile_that_is_not_reliable_is_told_from_one_that_is():
    angles = np.random.default_rng(0).uniform(-3, 3, 500)
    profiles = {name: free_energy_profile(angles, n_bins=20, n_bootstrap=20) for name in ("EBM", "refined")}
    figure = plotting.plot_profiles(profiles, unreliable=["EBM"])
    (ax,) = figure.axes
    styles = {line.get_label(): line.get_linestyle() for line in ax.lines}
    assert styles == {"EBM: not reliable": ":", "refined": "-"}


def test_every_figure_can_be_drawn(tmp_path):
    for number, (figure, n_axes) in enumerate(figures()):
        assert isinstance(figure, Figure)
        assert len(figure.axes) == n_axes
        figure.savefig(tmp_path / f"{number}.png")


def test_conformers_are_superposed_without_mirroring():
    """Copies of one conformer, turned and shifted, lie on it; its mirror image does not."""
    generator = np.random.default_rng(0)
    x = generator.normal(size=(6, 3))
    turn = np.linalg.qr(generator.normal(size=(3, 3)))[0]
    turn *= np.sign(np.linalg.det(turn))
    copies = np.stack([x, x @ turn + 5.0, -x])
    figure = plotting.plot_conformers({"copies": copies}, ["C", "C", "N", "O", "H", "Xx"], [(0, 1), (1, 2)])
    (axes,) = figure.axes
    first, turned, mirrored = (np.stack(collection._offsets3d) for collection in axes.collections)
    np.testing.assert_allclose(turned, first, atol=1e-9)
    assert np.abs(mirrored - first).max() > 0.1
    assert len(axes.lines) == 6
