"""Batches of unlike molecules: buckets, every frame once an epoch, the same batch for the same step."""

from collections import Counter

import numpy as np
import pytest
import torch

from boltznce.data.batching import Batches, size_buckets
from boltznce.errors import UserError

SIZES, FRAMES = (20, 35, 19, 33, 34), (40, 24, 17, 30, 11)


@pytest.fixture
def batches():
    """Frames that tell which they are: atom 0 less atom 1 is (frame + 1, molecule, 0)."""
    positions = []
    for k, (n, m) in enumerate(zip(SIZES, FRAMES, strict=True)):
        x = np.random.default_rng(k).normal(size=(m, n, 3)).astype(np.float32)
        x[:, 0] = x[:, 1] + np.stack([np.arange(m) + 1, np.full(m, k), np.zeros(m)], axis=1)
        positions.append(x)
    features = [torch.nn.functional.one_hot(torch.arange(n) % 4, 4).float() for n in SIZES]
    return lambda **settings: Batches(positions, features, **({"batch_size": 8, "seed": 0} | settings))


def frames(x, molecules):
    tags = (x[:, 0] - x[:, 1]).round().long()
    assert (tags[:, 1] == molecules.index).all()
    return [(k, frame) for frame, k, _ in tags.tolist()]


def test_buckets_bound_the_padding():
    assert size_buckets(SIZES, 0.1) == [[0, 2], [1, 4, 3]]
    assert size_buckets(SIZES, 0.0) == [[2], [0], [3], [4], [1]]
    assert size_buckets(SIZES, 0.9) == [[1, 4, 3, 0, 2]]


def test_an_epoch_has_every_frame_once_but_the_rest_of_a_bucket(batches):
    stream = batches(max_padding=0.1)
    assert stream.steps_per_epoch == 57 // 8 + 65 // 8
    for epoch in range(2):
        seen = Counter()
        for step in range(stream.steps_per_epoch):
            x, molecules = stream(epoch * stream.steps_per_epoch + step)
            assert len(x) == 8
            assert (x[~molecules.mask] == 0).all()
            assert x.sum(1).abs().max() < 1e-4
            assert molecules.n_atoms.tolist() == [SIZES[k] for k in molecules.index.tolist()]
            assert molecules.n_atoms.min() >= 0.9 * x.shape[1]
            assert x.shape[1] == molecules.n_atoms.max()
            seen.update(frames(x, molecules))
        assert max(seen.values()) == 1
        assert len(seen) == 8 * stream.steps_per_epoch


def test_a_batch_depends_on_seed_and_step_alone(batches):
    one, other = batches(), batches()
    for step in (0, 5):
        one(step)
    for step in (20, 3, 20):  # out of order, over epochs
        torch.testing.assert_close(one(step)[0], other(step)[0])
    assert not torch.equal(one(3)[0], one(3 + one.steps_per_epoch)[0])
    assert one(3)[0].shape != batches(seed=1)(3)[0].shape or not torch.equal(one(3)[0], batches(seed=1)(3)[0])


def test_rows_of_one_molecule_stand_together(batches):
    stream = batches(per_molecule=4, max_padding=0.1)
    kinds = [len(stream(step)[1].index.unique()) for step in range(stream.steps_per_epoch)]
    assert np.mean(kinds) < np.mean(
        [len(batches(max_padding=0.1)(step)[1].index.unique()) for step in range(stream.steps_per_epoch)]
    )


def test_bad_settings_are_one_sentence(batches):
    with pytest.raises(UserError, match="lower batch_size"):
        batches(batch_size=1000)
    with pytest.raises(UserError, match="max_padding"):
        batches(max_padding=1.0)
    with pytest.raises(UserError, match="in its features"):
        Batches([np.zeros((9, 4, 3), np.float32)], [torch.zeros(5, 2)], batch_size=2, seed=0)
