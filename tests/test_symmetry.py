"""Methyl rotations, mended chirality."""

import torch

from boltznce.systems.symmetry import mend_chirality, rotate_methyls


def test_methyls_turn_and_nothing_else_moves():
    x = torch.arange(7.0).reshape(1, 7, 1).expand(600, 7, 3)
    turned = rotate_methyls(x, [(0, 2, 3), (4, 5, 6)], torch.Generator().manual_seed(0))[:, :, 0].int()
    assert (turned[:, 1] == 1).all()
    seen = {tuple(row.tolist()) for row in turned}
    # three cyclic orders of each methyl, never an exchange of two hydrogens
    assert {tuple(r[i] for i in (0, 2, 3)) for r in seen} == {(0, 2, 3), (2, 3, 0), (3, 0, 2)}
    assert len(seen) == 9
    assert rotate_methyls(x, []) is x


def test_mirrored_where_all_centres_are_inverted_dropped_where_some_are():
    x = torch.randn(4, 5, 3)
    signs = torch.tensor([[1.0, 1], [-1, -1], [1, -1], [1, 1]])
    mended = mend_chirality(x, signs, mirror=True)
    assert mended.kept.tolist() == [True, True, False, True]
    assert (mended.n_mirrored, mended.n_dropped) == (1, 1)
    torch.testing.assert_close(mended.positions, torch.stack([x[0], -x[1], x[3]]))
    assert mend_chirality(x, signs, mirror=False).kept.tolist() == [True, False, False, True]


def test_without_stereocentres_everything_is_kept():
    x = torch.randn(3, 5, 3)
    torch.testing.assert_close(mend_chirality(x, torch.empty(3, 0), mirror=True).positions, x)
