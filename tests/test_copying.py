"""The copying check on images whose origin is known."""

import numpy as np
import pytest

from raresynth.quality.copying import (
    SIDE,
    check_copying,
    nearer_share,
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


def check(synthetic, train, groups=None, unseen=None, unseen_groups=None):
    groups = np.arange(len(train)) if groups is None else groups
    unseen = train[:0] if unseen is None else unseen
    unseen_groups = np.arange(len(unseen)) if unseen_groups is None else unseen_groups
    return check_copying(synthetic, train, groups, unseen, unseen_groups, 0.5)


def test_turned_mirrored_shifted_and_recoloured_copies_are_found(images):
    train = images[:30]
    copies = np.rot90(np.roll(train[:, :, ::-1], (1, -2), (1, 2)), 1, (1, 2))
    found = check(np.clip(copies * 0.8 + 20, 0, 255).astype(np.uint8), train)
    assert found.n_near_copies == 30
    assert found.nearest.tolist() == list(range(30))
    assert found.authenticity == 0
    assert found.nearer == (1.0, 1.0, 1.0)


def test_unrelated_images_are_no_copies(images):
    found = check(images[30:], images[:30])
    assert found.n_near_copies == 0
    assert found.authenticity > 0.3
    assert found.nearer.low < 0.5 < found.nearer.high


def test_a_second_picture_of_the_same_lesion_does_not_hide_a_copy(images):
    """With every train image there twice, a copy is as near to its twin; its group counts once."""
    train = np.concatenate([images[:30], images[:30]])
    groups = np.tile(np.arange(30), 2)
    assert check(images[:30], train, groups).n_near_copies == 30
    assert check(images[30:], train, groups).n_near_copies == 0


def test_the_reals_are_unseen_ones_where_there_are_enough_and_else_train_images(images):
    """Unseen images that are copies themselves make unrelated synthetic ones look far away."""
    found = check(images[30:], images[:30], unseen=images[:25])
    assert found.nearer == (0.0, 0.0, 0.0)
    assert (len(found.reals), len(check(images[30:], images[:30], unseen=images[:3]).reals)) == (25, 30)


def test_many_unseen_images_of_few_patients_are_not_enough(images):
    train_instead = check(images[30:], images[:30])
    for groups in (np.zeros(25, np.int64), np.arange(25) // 2):
        found = check(images[30:], images[:30], unseen=images[:25], unseen_groups=groups)
        assert found.nearer == train_instead.nearer


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
    assert blocks.nearer == pytest.approx(one.nearer)
    assert check(synthetic, train, groups).nearer == pytest.approx(without_unseen.nearer)


def test_row_blocks_hold_every_row_once_and_at_least_one(monkeypatch):
    monkeypatch.setattr("raresynth.quality.copying.PAIRS_AT_ONCE", 10)
    assert [list(range(7))[rows] for rows in row_blocks(7, 3)] == [[0, 1], [2, 3], [4, 5, 6]]
    assert len(list(row_blocks(7, 11))) == 7


def test_nearer_share_by_hand():
    # 1 < 2, 1 < 4 and 3 < 4, but 3 > 2: 3/4 of the pairs. The 20 synthetic images' own shares are 1 and 1/2, the 20
    # reals' are 1/2 and 1, so that the means of either have the variance (1/4)^2 / 19. In four groups of five that are
    # alike the reals' has (1/4)^2 / 3.
    synthetic, reals = np.repeat([1.0, 3.0], 10), np.repeat([2.0, 4.0], 10)
    for groups, variance in ((np.arange(20), 2 / 16 / 19), (np.repeat(np.arange(4), 5), 1 / 16 / 19 + 1 / 16 / 3)):
        half = 1.959964 * np.sqrt(variance)
        expected = (0.75, 0.75 - half, min(1.0, 0.75 + half))
        assert nearer_share(synthetic, reals, groups) == pytest.approx(expected, abs=1e-6)
    assert nearer_share(reals, reals, np.arange(20)).value == 0.5  # ties are half


@pytest.mark.parametrize("images_per_group", [1, 10])
def test_the_interval_of_the_nearer_share_holds_the_truth_also_of_groups_of_like_images(images_per_group):
    """Of images that no more lie nearer than reals do, however many: a z-score without groups calls copies of them."""
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(30), images_per_group)
    found = [
        nearer_share(rng.normal(size=500), rng.normal(size=30)[groups] + 0.1 * rng.normal(size=len(groups)), groups)
        for _ in range(300)
    ]
    held = np.mean([share.low <= 0.5 <= share.high for share in found])
    assert 0.9 <= held <= 0.98
    assert np.mean([share.value for share in found]) == pytest.approx(0.5, abs=0.02)


def test_a_small_tendency_stays_small_however_many_images_show_it():
    rng = np.random.default_rng(0)
    found = nearer_share(rng.normal(-0.25, 1, 5000), rng.normal(size=5000), np.arange(5000))
    assert 0.5 < found.low < found.high < 0.6


def test_wilson_interval_of_none_in_100():
    # z^2 / (n + z^2) is the upper bound where none is seen.
    z2 = 1.959964**2
    assert wilson_interval(0, 100) == pytest.approx((0.0, z2 / (100 + z2)))
