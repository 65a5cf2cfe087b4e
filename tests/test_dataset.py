"""The dataset on disk, its splits, and resampling."""

import itertools
import shutil

import numpy as np
import pytest
import yaml

from boltznce.data.dataset import Dataset, boltzmann_indices, mode_balanced_indices
from boltznce.errors import UserError
from boltznce.io import file_digest
from boltznce.records import sealed
from boltznce.states import State

N_TIMES, N_WINDOWS, N_REPEATS = 200, 4, 2


@pytest.fixture
def dataset(tmp_path):
    rng = np.random.default_rng(0)
    time, repeat, window = (
        a.ravel() for a in np.meshgrid(np.arange(N_TIMES), np.arange(N_REPEATS), np.arange(N_WINDOWS), indexing="ij")
    )
    n = len(time)
    positions = rng.standard_normal((n, 3, 3)).astype(np.float32)
    return Dataset.write(
        tmp_path / "set",
        iter(np.array_split(positions, 7)),
        positions.sum((1, 2)),
        log_weights=rng.standard_normal(n),
        time=time,
        window=window,
        repeat=repeat,
        topology="END\n",
        meta={"seed": 3},
    )


def replace_array(folder, name, array):
    """Put another array in a dataset, with a digest that fits."""
    np.save(folder / name, array)
    meta = yaml.safe_load((folder / "meta.yaml").read_text())
    meta["digests"][name] = file_digest(folder / name)
    (folder / "meta.yaml").write_text(yaml.safe_dump(sealed(meta)))


def test_round_trip(dataset, tmp_path):
    again = Dataset.load(tmp_path / "set")
    assert isinstance(again.positions, np.memmap)
    assert again.meta["seed"] == 3
    assert again.topology == "END\n"
    np.testing.assert_allclose(again.energies, again.positions.sum((1, 2)), rtol=1e-5)


def test_splits_are_disjoint_in_time_and_hold_all_windows(dataset):
    parts = dataset.split(0.7, 0.1, 0.2, gap=0.02)
    for earlier, later in itertools.pairwise(parts):
        assert later.time.min() - earlier.time.max() > 0.02 * N_TIMES
    for part, share in zip(parts, (0.7, 0.08, 0.18), strict=True):
        assert len(part) / len(dataset) == pytest.approx(share, abs=0.01)
        counts = np.unique(np.stack([part.window, part.repeat]), axis=1, return_counts=True)[1]
        assert len(counts) == N_WINDOWS * N_REPEATS
        assert (counts == counts[0]).all()
        np.testing.assert_allclose(part.energies, part.positions.sum((1, 2)), rtol=1e-5)


@pytest.mark.parametrize("fractions", [(0.7, 0.1, 0.3), (1.0, 0.0, 0.0)])
def test_fractions_that_are_no_split(dataset, fractions):
    with pytest.raises(UserError, match="sum to 1"):
        dataset.split(*fractions)


@pytest.mark.parametrize("name", ["positions.npy", "energies.npy", "log_weights.npy", "topology.pdb"])
def test_a_changed_byte_is_damage(dataset, tmp_path, name):
    path = tmp_path / "set" / name
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"{name} is damaged.*by simulating"):
        Dataset.load(tmp_path / "set")


@pytest.mark.parametrize("name", ["positions.npy", "time.npy"])
def test_a_truncated_array_is_damage(dataset, tmp_path, name):
    path = tmp_path / "set" / name
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=f"{name} is damaged .it is truncated"):
        Dataset.load(tmp_path / "set")


def test_missing_parts(dataset, tmp_path):
    (tmp_path / "set" / "window.npy").unlink()
    with pytest.raises(UserError, match=r"window.npy is damaged .it is missing"):
        Dataset.load(tmp_path / "set")
    shutil.rmtree(tmp_path / "set")
    with pytest.raises(UserError, match="There is no dataset"):
        Dataset.load(tmp_path / "set")


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_energies_that_are_not_finite(dataset, tmp_path, bad):
    energies = dataset.energies.copy()
    energies[5] = bad
    with pytest.raises(UserError, match=r"energies.npy has 1 values that are not finite .the first at frame 5"):
        Dataset.write(tmp_path / "other", np.asarray(dataset.positions), energies)
    assert not (tmp_path / "other").exists()
    replace_array(tmp_path / "set", "energies.npy", energies)
    with pytest.raises(UserError, match="frame 5"):
        Dataset.load(tmp_path / "set")


def test_wrong_number_of_positions(dataset, tmp_path):
    with pytest.raises(UserError, match="as many positions"):
        Dataset.write(tmp_path / "other", np.asarray(dataset.positions)[:-1], dataset.energies)
    replace_array(tmp_path / "set", "energies.npy", dataset.energies[:-1])
    with pytest.raises(UserError, match="shape"):
        Dataset.load(tmp_path / "set")


@pytest.mark.parametrize("turn", [0.0, 2.4])
@pytest.mark.parametrize("weighted", [False, True])
def test_mode_balancing_makes_modes_even(weighted, turn):
    """1% in the state, or half of the frames with weights that say 1%; turned, the state is across π."""
    rng = np.random.default_rng(1)
    inside = rng.random(50_000) < (0.5 if weighted else 0.01)
    phi = np.where(inside, rng.vonmises(1.0, 20.0, 50_000), rng.vonmises(-1.8, 4.0, 50_000))
    phi, state = np.angle(np.exp(1j * (phi + turn))), State("phi", (turn, 2.0 + turn))
    log_weights = np.where(inside, np.log(0.01), np.log(0.99)) if weighted else np.zeros(len(phi))
    balanced = phi[mode_balanced_indices(phi, log_weights, 20_000, rng, state, c="auto")]
    assert 0.4 < state.contains(balanced).mean() < 0.6
    natural = phi[boltzmann_indices(log_weights, 20_000, rng)]
    assert 0.007 < state.contains(natural).mean() < 0.014


def test_mode_balancing_without_the_state():
    phi, rng = np.full(10, -1.0), np.random.default_rng(0)
    with pytest.raises(UserError, match="No frame has 0 < phi < 2 rad"):
        mode_balanced_indices(phi, np.zeros(10), 5, rng, State("phi", (0.0, 2.0)), c="auto")


def test_a_dataset_of_a_newer_version_is_refused_and_one_without_a_version_loads(tmp_path):
    folder = tmp_path / "data"
    Dataset.write(folder, np.zeros((4, 2, 3)), np.zeros(4))
    meta = yaml.safe_load((folder / "meta.yaml").read_text())
    assert meta["format"] == 1
    (folder / "meta.yaml").write_text(yaml.safe_dump({key: value for key, value in meta.items() if key != "format"}))
    assert len(Dataset.load(folder)) == 4
    (folder / "meta.yaml").write_text(yaml.safe_dump(meta | {"format": 99}))
    with pytest.raises(UserError, match="99"):
        Dataset.load(folder)
