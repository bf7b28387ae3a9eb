"""The copying check on images whose origin is known."""

import numpy as np
import pytest

from raresynth.quality.copying import (
    SIDE,
    check_copying,
    mann_whitney_z,
    relative_distances,
    row_blocks,
    wilson_interval,
)


@pytest.fixture
def images():
    """60 unrelated smooth images."""
    from scipy.ndimage import gaussian_filter

    noise = np.random.default_rng(0).normal(size=(60, SIDE, SIDE, 3))
    smooth = gaussian_filter(noise, (0, 4, 4, 0))
    return np.clip(128 + 60 * smooth / smooth.std(), 0, 255).astype(np.uint8)


def check(synthetic, train, groups=None, unseen=None):
    groups = np.arange(len(train)) if groups is None else groups
    return check_copying(synthetic, train, groups, train[:0] if unseen is None else unseen, 0.5)


def test_turned_mirrored_shifted_and_recoloured_copies_are_found(images):
    train = images[:30]
    copies = np.rot90(np.roll(train[:, :, ::-1], (1, -2), (1, 2)), 1, (1, 2))
    found = check(np.clip(copies * 0.8 + 20, 0, 255).astype(np.uint8), train)
    assert found.n_near_copies == 30
    assert found.nearest.tolist() == list(range(30))
    assert found.authenticity == 0
    assert found.c_t < -5


def test_unrelated_images_are_no_copies(images):
    found = check(images[30:], images[:30])
    assert found.n_near_copies == 0
    assert found.authenticity > 0.3
    assert abs(found.c_t) < 3


def test_a_second_picture_of_the_same_lesion_does_not_hide_a_copy(images):
    """With every train image there twice, a copy is as near to its twin; its group counts once."""
    train = np.concatenate([images[:30], images[:30]])
    groups = np.tile(np.arange(30), 2)
    assert check(images[:30], train, groups).n_near_copies == 30
    assert check(images[30:], train, groups).n_near_copies == 0


def test_c_t_compares_with_unseen_reals_where_there_are_enough(images):
    """Unseen images that are copies themselves make unrelated synthetic ones look far away."""
    found = check(images[30:], images[:30], unseen=images[:25])
    assert found.c_t > 3


def test_blocks_of_rows_give_what_one_block_gives(images, monkeypatch):
    """Within 32-bit rounding: products of fewer rows need not add up in the same order."""
    train, synthetic, unseen = images[:30], np.concatenate([images[30:40], images[5:8, ::-1]]), images[40:]
    groups = np.arange(30) // 4
    one, near = check(synthetic, train, groups, unseen), relative_distances(synthetic, train, groups)
    without_unseen = check(synthetic, train, groups)
    monkeypatch.setattr("raresynth.quality.copying.PAIRS_AT_ONCE", 4 * 30 + 1)
    blocks = check(synthetic, train, groups, unseen)
    assert blocks.relative == pytest.approx(one.relative, rel=1e-6, abs=1e-6)
    assert relative_distances(synthetic, train, groups) == pytest.approx(near, rel=1e-6, abs=1e-6)
    assert blocks.nearest.tolist() == one.nearest.tolist()
    assert (blocks.n_near_copies, blocks.authenticity) == (one.n_near_copies, one.authenticity)
    assert one.n_near_copies == 3
    assert blocks.c_t == pytest.approx(one.c_t)
    assert check(synthetic, train, groups).c_t == pytest.approx(without_unseen.c_t)


def test_row_blocks_hold_every_row_once_and_at_least_one(monkeypatch):
    monkeypatch.setattr("raresynth.quality.copying.PAIRS_AT_ONCE", 10)
    assert [list(range(7))[rows] for rows in row_blocks(7, 3)] == [[0, 1], [2, 3], [4, 5, 6]]
    assert len(list(row_blocks(7, 11))) == 7


def test_mann_whitney_z_by_hand():
    # Every one of 3 below every one of 2: U = 0, mean 3, variance 3 * 2 * 6 / 12 = 3.
    assert mann_whitney_z(np.array([1.0, 2.0, 3.0]), np.array([4.0, 5.0])) == pytest.approx(-3 / np.sqrt(3))


def test_wilson_interval_of_none_in_100():
    # z^2 / (n + z^2) is the upper bound where none is seen.
    z2 = 1.959964**2
    assert wilson_interval(0, 100) == pytest.approx((0.0, z2 / (100 + z2)))
