import mdtraj
import numpy as np
import pytest
import torch

from boltznce.analysis.pareto import fit_generalized_pareto, pareto_k, tail_share
from boltznce.analysis.reweighting import (
    WeightedSamples,
    WeightedSamplesWriter,
    guard,
    log_importance_weights,
    normalized_weights,
)
from boltznce.errors import UserError


def make_samples(n: int = 40, n_atoms: int = 3, seed: int = 0) -> WeightedSamples:
    generator = np.random.default_rng(seed)
    topology = mdtraj.Topology()
    residue = topology.add_residue("ALA", topology.add_chain())
    for index in range(n_atoms):
        topology.add_atom(f"C{index}", mdtraj.element.carbon, residue)
    positions = generator.normal(size=(n, n_atoms, 3)).astype(np.float32)
    return WeightedSamples(
        positions, generator.normal(size=n), generator.normal(size=n), topology=topology, meta={"seed": np.int64(3)}
    )


def same(a: WeightedSamples, b: WeightedSamples) -> bool:
    return all(
        np.array_equal(getattr(a, name), getattr(b, name))
        for name in ("positions", "energy", "log_prob", "log_weights")
    )


def test_log_weights_are_minus_energy_minus_log_prob():
    samples = make_samples()
    np.testing.assert_array_equal(samples.log_weights, -samples.energy - samples.log_prob)
    assert samples.weights.sum() == pytest.approx(1.0)


def test_ess_is_one_for_constant_weights_and_one_over_n_for_a_single_one():
    energy = np.linspace(0.0, 900.0, 50)
    assert WeightedSamples(np.zeros((50, 1, 3)), energy, -energy + 5.0).ess == pytest.approx(1.0)
    energy[1:] = np.inf
    assert WeightedSamples(np.zeros((50, 1, 3)), energy, np.zeros(50)).ess == pytest.approx(1 / 50)


def test_ess_of_gaussian_reweighting():
    """From N(0, 1) to N(m, s^2): E[w]^2 / E[w^2] = s sqrt(2 - s^2) exp(-m^2 / (2 - s^2))."""
    mean, sigma = 0.5, 0.8
    x = np.random.default_rng(0).normal(size=400_000)
    log_weights = -0.5 * ((x - mean) / sigma) ** 2 + 0.5 * x**2
    expected = sigma * np.sqrt(2 - sigma**2) * np.exp(-(mean**2) / (2 - sigma**2))
    samples = WeightedSamples(np.zeros((len(x), 1, 2)), -log_weights, np.zeros(len(x)))
    assert samples.ess == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("k", [0.3, 0.9])
def test_pareto_k_of_generalized_pareto_samples(k):
    uniform = np.random.default_rng(1).random(20_000)
    excess = (uniform**-k - 1.0) / k
    assert fit_generalized_pareto(excess) == pytest.approx(k, abs=0.03)
    repeats = [pareto_k(np.log((np.random.default_rng(seed).random(20_000) ** -k - 1.0) / k)) for seed in range(10)]
    assert np.mean(repeats) == pytest.approx(k, abs=0.06)


def test_tail_share_of_exponential_weights():
    """Above a threshold that a share p exceeds, exponential weights have an excess of mean one: p of a sum of n."""
    weights = np.random.default_rng(0).exponential(size=1_000_000)
    assert tail_share(np.log(weights) + 1000.0) == pytest.approx(3e-3, rel=0.05)
    assert tail_share(np.zeros(1000)) == 0.0
    assert np.isnan(tail_share(np.zeros(10)))


def test_a_heavy_tail_on_equal_weights_carries_nothing():
    heavy = np.random.default_rng(0).random(10_000) ** -0.9
    assert pareto_k(np.log1p(1e-5 * heavy)) == pytest.approx(pareto_k(np.log(heavy)), abs=0.02)
    assert tail_share(np.log1p(1e-5 * heavy)) < 1e-4 < 0.3 < tail_share(np.log(heavy))


def test_pareto_k_edges():
    assert pareto_k(np.zeros(1000)) == -np.inf
    assert np.isnan(pareto_k(np.arange(10.0)))
    assert pareto_k(np.random.default_rng(0).random(10_000)) < 0.3
    assert np.isfinite(fit_generalized_pareto(np.repeat([1.0, 2.0, 5.0], [6, 1, 1])))  # the grid of theta meets zero
    assert pareto_k(400.0 * np.random.default_rng(0).normal(size=1000)) > 1.0
    half_infinite = np.where(np.arange(2000) % 2, np.random.default_rng(0).normal(size=2000), -np.inf)
    assert np.isfinite(pareto_k(half_infinite))


def test_bad_weights_are_user_errors():
    with pytest.raises(UserError, match="NaN"):
        WeightedSamples(np.zeros((2, 1, 3)), [0.0, np.nan], [0.0, 0.0])
    with pytest.raises(UserError, match="NaN"):
        normalized_weights(np.array([0.0, np.nan]))
    with pytest.raises(UserError, match="infinite"):
        normalized_weights(np.array([-np.inf, -np.inf]))
    with pytest.raises(UserError, match="got"):
        WeightedSamples(np.zeros((3, 1, 3)), np.zeros(2), np.zeros(3))


def test_without_likelihood_all_weights_are_equal():
    samples = WeightedSamples(np.zeros((5, 1, 3)), np.arange(5.0), np.full(5, np.nan))
    np.testing.assert_array_equal(samples.log_weights, np.zeros(5))


def test_clip_and_remove_top():
    samples = WeightedSamples(np.zeros((10, 1, 3)), -np.arange(10.0), np.zeros(10))
    np.testing.assert_array_equal(samples.clip(0.3).log_weights, [0, 1, 2, 3, 4, 5, 6, 7, 7, 7])
    np.testing.assert_array_equal(samples.remove_top(0.3).log_weights, np.arange(7.0))
    assert len(samples.remove_top(0.0)) == 10
    assert same(samples.clip(0.0), samples)
    with pytest.raises(UserError, match="fraction"):
        samples.clip(1.0)


def test_select():
    samples = make_samples()
    mask = samples.energy > 0.0
    assert len(samples[mask]) == mask.sum()


def test_what_is_not_finite_weighs_nothing():
    energy, log_prob = torch.tensor([1.0, torch.nan, 2.0, torch.inf]), torch.tensor([0.5, 0.0, -torch.inf, 0.0])
    energy, log_prob, n = guard(energy, log_prob)
    assert (energy.dtype, log_prob.dtype, n) == (torch.float64, torch.float64, 3)
    np.testing.assert_array_equal(log_importance_weights(energy, log_prob), [-1.5, -np.inf, -np.inf, -np.inf])


def test_repr_is_one_line():
    assert repr(make_samples(400)).startswith("WeightedSamples: 400 of 3 atoms, ESS ")
    assert "no weight" in repr(WeightedSamples(np.zeros((2, 1, 3)), [np.inf, np.inf], [0.0, 0.0]))


def test_resampling_follows_the_weights():
    samples = WeightedSamples(np.arange(3.0)[:, None, None] * np.ones((3, 1, 3)), -np.log([0.2, 0.3, 0.5]), np.zeros(3))
    drawn = samples.resample(100_000, np.random.default_rng(0))
    np.testing.assert_allclose(np.bincount(drawn.positions[:, 0, 0].astype(int)) / 1e5, [0.2, 0.3, 0.5], atol=0.006)
    assert drawn.ess == pytest.approx(1.0)


@pytest.mark.parametrize("format", ["npy", "dcd", "xtc"])
def test_round_trip(tmp_path, format):
    samples = make_samples()
    samples.save(tmp_path / "samples", format=format)
    samples.save(tmp_path / "samples", format=format)
    loaded = WeightedSamples.load(tmp_path / "samples")
    assert same(loaded, samples)
    assert isinstance(loaded.positions, np.memmap)
    assert loaded.positions.dtype == np.float32
    assert loaded.meta == {"seed": 3}
    assert [a.name for a in loaded.topology.atoms] == [a.name for a in samples.topology.atoms]
    assert [path.name for path in tmp_path.iterdir()] == ["samples"]
    if format != "npy":
        trajectory = mdtraj.load(tmp_path / "samples" / f"trajectory.{format}", top=samples.topology)
        np.testing.assert_allclose(trajectory.xyz, samples.positions, atol=1e-3)


def append(writer: WeightedSamplesWriter, part: WeightedSamples) -> None:
    writer.append(part.positions, part.energy, part.log_prob)


def test_samples_of_a_newer_version_are_refused(tmp_path):
    make_samples().save(tmp_path / "out")
    meta = tmp_path / "out" / "meta.yaml"
    text = meta.read_text()
    assert text.startswith("format: 1\n")
    meta.write_text(text.replace("format: 1\n", ""))
    assert len(WeightedSamples.load(tmp_path / "out")) == 40
    meta.write_text(text.replace("format: 1\n", "format: 2\n"))
    with pytest.raises(UserError, match="format 2"):
        WeightedSamples.load(tmp_path / "out")


def test_writer_goes_on_after_an_interrupted_write(tmp_path):
    samples = make_samples()
    writer = WeightedSamplesWriter(tmp_path / "out", samples.topology, {"run": 1})
    append(writer, samples[:10])
    append(writer, samples[10:25])
    with open(tmp_path / ".out.partial" / "positions.npy", "ab") as handle:  # a kill in the middle of the next append
        handle.write(b"half a chunk")
    assert not (tmp_path / "out").exists()
    resumed = WeightedSamplesWriter(tmp_path / "out", samples.topology, {"run": 1})
    assert resumed.n_written == 25
    append(resumed, samples[25:])
    resumed.finish()
    assert same(WeightedSamples.load(tmp_path / "out"), samples)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        ["positions.npy", "energy.npy", "log_prob.npy", "log_weights.npy", "topology.pdb", "topology.json", "meta.yaml"]
    )


def test_writer_repeats_a_chunk_that_was_not_committed(tmp_path, monkeypatch):
    samples = make_samples()
    writer = WeightedSamplesWriter(tmp_path / "out")
    append(writer, samples[:10])
    with monkeypatch.context() as patch:
        patch.setattr("boltznce.analysis.samples_io.atomic_file", lambda path: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            append(writer, samples[10:35])
    resumed = WeightedSamplesWriter(tmp_path / "out")
    assert resumed.n_written == 10
    append(resumed, samples[10:20])
    resumed.finish()
    assert same(WeightedSamples.load(tmp_path / "out"), samples[:20])


def test_writer_refuses_what_does_not_fit(tmp_path):
    samples = make_samples()
    writer = WeightedSamplesWriter(tmp_path / "out", meta={"run": 1})
    append(writer, samples)
    with pytest.raises(UserError, match="shape"):
        append(writer, make_samples(n_atoms=4))
    with pytest.raises(UserError, match="other settings"):
        WeightedSamplesWriter(tmp_path / "out", meta={"run": 2})
    assert WeightedSamplesWriter(tmp_path / "out", meta={"run": 2}, resume=False).n_written == 0
    with pytest.raises(UserError, match="No samples"):
        WeightedSamplesWriter(tmp_path / "empty").finish()
    with pytest.raises(UserError, match="format"):
        samples.save(tmp_path / "out", format="pdb")


@pytest.mark.parametrize("name", ["positions.npy", "energy.npy", "log_weights.npy", "meta.yaml"])
def test_truncated_file_is_named(tmp_path, name):
    make_samples().save(tmp_path / "out")
    path = tmp_path / "out" / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match=name):
        WeightedSamples.load(tmp_path / "out")


def test_damaged_and_missing_files_are_named(tmp_path):
    make_samples().save(tmp_path / "out")
    contents = bytearray((tmp_path / "out" / "energy.npy").read_bytes())
    contents[-1] ^= 1
    (tmp_path / "out" / "energy.npy").write_bytes(contents)
    with pytest.raises(UserError, match=r"energy\.npy is damaged"):
        WeightedSamples.load(tmp_path / "out")
    (tmp_path / "out" / "energy.npy").unlink()
    with pytest.raises(UserError, match=r"energy\.npy is missing"):
        WeightedSamples.load(tmp_path / "out")
    with pytest.raises(UserError, match="no weighted samples"):
        WeightedSamples.load(tmp_path)
