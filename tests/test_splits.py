"""Splits: stratified, grouped, and a function of the seed and the rows alone."""

import random
from collections import Counter

import pytest

from raresynth.config import SplitShares
from raresynth.dataset.manifest import SPLITS
from raresynth.dataset.splits import assign_splits

SHARES = {"train": 0.7, "val": 0.15, "test": 0.15}


def counts(labels, groups, splits):
    return Counter((label, splits[group]) for label, group in zip(labels, groups, strict=True))


def images(seed, classes=(500, 120, 40, 9), largest_group=4, mixed=0.0):
    """Labels and groups of classes of the given sizes; a share `mixed` of the images joins another class's group."""
    draw = random.Random(seed)
    labels, groups = [], []
    for label, size in enumerate(classes):
        while sum(item == f"c{label}" for item in labels) < size:
            group = draw.choice(groups) if groups and draw.random() < mixed else f"g{len(groups)}"
            n = min(draw.randint(1, largest_group), size - sum(item == f"c{label}" for item in labels))
            labels += [f"c{label}"] * n
            groups += [group] * n
    return labels, groups


@pytest.mark.parametrize("seed", range(5))
def test_single_images_are_shared_out_to_the_rounding(seed):
    labels, groups = images(seed, largest_group=1)
    found = counts(labels, groups, assign_splits(labels, groups, SplitShares(), seed))
    for label, n in Counter(labels).items():
        for split in SPLITS:
            assert abs(found[label, split] - SHARES[split] * n) <= 1, (label, split)


@pytest.mark.parametrize("seed", range(5))
def test_groups_move_whole_and_cost_at_most_their_size(seed):
    labels, groups = images(seed)
    splits = assign_splits(labels, groups, SplitShares(), seed)
    assert set(splits) == set(groups)
    found = counts(labels, groups, splits)
    for label, n in Counter(labels).items():
        for split in SPLITS:
            assert abs(found[label, split] - SHARES[split] * n) <= 4, (label, split)


@pytest.mark.parametrize("seed", range(5))
def test_groups_of_several_classes_are_never_divided(seed):
    labels, groups = images(seed, classes=(300, 100, 50), mixed=0.2)
    found = counts(labels, groups, assign_splits(labels, groups, SplitShares(), seed))
    for label, n in Counter(labels).items():
        for split in SPLITS:
            assert abs(found[label, split] - SHARES[split] * n) <= 0.05 * n + 4, (label, split)


@pytest.mark.parametrize("n_groups", [3, 4, 5, 6, 7])
def test_a_rare_class_is_present_in_every_split(n_groups):
    labels = ["common"] * 100 + ["rare"] * n_groups
    groups = [str(index) for index in range(len(labels))]
    found = counts(labels, groups, assign_splits(labels, groups, SplitShares(), 0))
    assert all(found["rare", split] >= 1 for split in SPLITS)
    assert found["rare", "train"] >= max(found["rare", "val"], found["rare", "test"])


def test_a_class_whose_groups_hold_rarer_ones_too_is_present_in_every_split():
    for seed in range(400):
        labels, groups = images(seed, classes=(30, 12, 8, 5), largest_group=2, mixed=0.6)
        splits = assign_splits(labels, groups, SplitShares(), seed)
        for label in set(labels):
            own = {group for of, group in zip(labels, groups, strict=True) if of == label}
            assert len(own) < 3 or {splits[group] for group in own} == set(SPLITS), (seed, label)


def test_the_order_of_the_rows_does_not_matter():
    labels, groups = images(1, mixed=0.1)
    rows = list(zip(labels, groups, strict=True))
    random.Random(9).shuffle(rows)
    shuffled = assign_splits([label for label, _ in rows], [group for _, group in rows], SplitShares(), 3)
    assert shuffled == assign_splits(labels, groups, SplitShares(), 3)


def test_the_seed_matters():
    labels, groups = images(1)
    assert assign_splits(labels, groups, SplitShares(), 0) != assign_splits(labels, groups, SplitShares(), 1)


def test_the_result_is_the_same_on_every_machine():
    labels, groups = ["a"] * 6 + ["b"] * 4, [f"g{index}" for index in range(10)]
    splits = assign_splits(labels, groups, SplitShares(train=0.5, val=0.25, test=0.25), 0)
    assert "".join(splits[group][1] for group in groups) == "arearrraer"
