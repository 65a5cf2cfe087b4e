"""The benchmark's rows, table and figure on a small case, and its one mistake."""

import json

import pytest

from boltznce.benchmarks.energy import energy_figure, energy_table, measure_energy
from boltznce.benchmarks.network import measure_network, network_figure, network_table
from boltznce.benchmarks.spline import measure_spline, spline_figure, spline_table
from boltznce.benchmarks.timing import time_call
from boltznce.errors import UserError


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
