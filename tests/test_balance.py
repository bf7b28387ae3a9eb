"""Balancing policies: how many images are synthesised for each class."""

import itertools

import pandas as pd
import pytest

from raresynth.config import BalanceConfig
from raresynth.dataset.balance import images_to_synthesize
from raresynth.errors import ParamsError


def manifest(**train):
    rows = [(label, "train") for label, n in train.items() for _ in range(n)]
    rows += [("rare", "val")] * 50 + [("rare", "test")] * 50
    return pd.DataFrame(rows, columns=["label", "split"])


def ask(counts, **knobs):
    return images_to_synthesize(manifest(**counts), BalanceConfig(**knobs))


def test_max_fills_every_class_up_to_the_largest_of_the_train_split():
    assert ask({"nv": 100, "mel": 40, "rare": 7}) == {"mel": 60, "rare": 93}


def test_a_balanced_set_asks_for_nothing():
    for policy in ("max", "fixed", "ratio", "min_share"):
        assert ask({"a": 10, "b": 10}, policy=policy) == {}


def test_fixed_and_ratio_are_for_all_but_the_largest():
    assert ask({"a": 100, "b": 9, "c": 5}, policy="fixed", count=30) == {"b": 30, "c": 30}
    assert ask({"a": 100, "b": 9, "c": 5}, policy="ratio", ratio=1.1) == {"b": 10, "c": 6}


def test_max_per_class_caps_every_policy():
    for policy in ("max", "fixed", "ratio", "min_share"):
        asked = ask({"a": 1000, "b": 40, "c": 30}, policy=policy, ratio=2.0, share=0.3, max_per_class=25)
        assert asked == {"b": 25, "c": 25}, policy


def test_min_share_counts_what_it_adds():
    # b: 10 of 100 now; with x added, (10 + x) / (100 + x) must be 0.2, so x = 12.5.
    assert ask({"a": 90, "b": 10}, policy="min_share", share=0.2) == {"b": 13}


def test_a_share_that_is_met_exactly_needs_no_image_more():
    # Binary floating point would ask for one too many: 0.1 * 30 > 3.
    assert ask({"a": 27, "b": 3}, policy="min_share", share=0.1) == {}
    assert ask({"a": 85, "b": 5}, policy="min_share", share=0.15) == {"b": 10}


@pytest.mark.parametrize(
    ("counts", "share"),
    [({"a": 30, "b": 3, "c": 2}, 0.2), ({"a": 20, "b": 4, "c": 1}, 0.3), ({"a": 12, "b": 11, "c": 1, "d": 2}, 0.25)],
)
def test_min_share_is_the_least_of_all_solutions(counts, share):
    asked = ask(counts, policy="min_share", share=share)
    total = sum(counts.values())
    below = [label for label, n in counts.items() if n < share * total]

    def enough(added):
        whole = total + sum(added.values())
        return all(counts[label] + added[label] >= share * whole - 1e-9 for label in below)

    assert set(asked) == set(below) and enough(asked)
    smaller = itertools.product(*(range(asked[label] + 1) for label in below))
    fits = [dict(zip(below, n, strict=True)) for n in smaller]
    assert [added for added in fits if enough(added)] == [asked]


def test_shares_that_cannot_all_be_had_are_refused_by_name():
    with pytest.raises(ParamsError, match=r"balance\.share: 2 classes cannot have 0\.5 .* below 1/2"):
        ask({"a": 100, "b": 3, "c": 2}, policy="min_share", share=0.5)


def test_min_share_near_the_impossible_is_solved_too():
    asked = ask({"a": 1000, **{f"r{i}": 10 + i for i in range(6)}}, policy="min_share", share=0.166)
    total = 1000 + sum(10 + i for i in range(6)) + sum(asked.values())
    assert all(10 + i + asked[f"r{i}"] >= 0.166 * total for i in range(6))
    assert total < 1000 / (1 - 6 * 0.166) + 6 / (1 - 6 * 0.166)


def test_only_the_classes_named_get_images():
    assert ask({"nv": 100, "mel": 40, "rare": 7}, classes=("rare",)) == {"rare": 93}
    assert ask({"nv": 100, "mel": 40, "rare": 7}, classes=("nv",)) == {}
    with pytest.raises(ParamsError, match="no train images of df; choose from mel, nv, rare"):
        ask({"nv": 100, "mel": 40, "rare": 7}, classes=("df",))
