"""Train, val and test: stratified by class, and no group (lesion, patient) in two of them."""

import hashlib
from collections import Counter
from collections.abc import Sequence

from raresynth.config import SplitShares
from raresynth.dataset.manifest import SPLITS


def assign_splits(labels: Sequence[str], groups: Sequence[str], shares: SplitShares, seed: int) -> dict[str, str]:
    """Give each group a split, so that every class has the wanted share of each.

    Iterative stratification (Sechidis, Tsoumakas and Vlahavas 2011) over whole groups: classes from the rarest
    to the most common, a class's largest groups first, each to the split that lacks most images of that class.
    A class of three groups or more is present in every split, unless its last groups hold other classes too that are
    missing elsewhere. The result depends on the seed and on the sets of labels and groups, not on their order.

    Args:
        labels: class of each image.
        groups: group of each image.

    Returns:
        split of each group, one of `SPLITS`.
    """
    contents: dict[str, Counter[str]] = {}
    for label, group in zip(labels, groups, strict=True):
        contents.setdefault(group, Counter())[label] += 1
    totals = Counter(labels)
    wanted = {split: {label: share * n for label, n in totals.items()} for split, share in _shares(shares)}
    by_rarest: dict[str, list[str]] = {}
    for group, counts in contents.items():
        by_rarest.setdefault(min(counts, key=lambda label: (totals[label], label)), []).append(group)

    assigned: dict[str, str] = {}
    absent = {label: set(SPLITS) for label in totals}
    left = Counter(label for counts in contents.values() for label in counts)
    for label in sorted(by_rarest, key=lambda label: (totals[label], label)):
        order = sorted(by_rarest[label], key=lambda group: (-contents[group][label], _shuffle_key(seed, group)))
        for group in order:
            allowed = set(SPLITS)
            # The last groups of a class go where it would otherwise be missing; the rarer class has the first say.
            for other in sorted(contents[group], key=lambda other: (totals[other], other)):
                if left[other] <= len(absent[other]):
                    allowed = allowed & absent[other] or allowed
            split = max(
                (split for split in SPLITS if split in allowed),
                key=lambda split: (round(wanted[split][label], 6), round(_lack(wanted[split]), 6)),
            )
            assigned[group] = split
            for other, n in contents[group].items():
                wanted[split][other] -= n
                left[other] -= 1
                absent[other].discard(split)
    return assigned


def _shares(shares: SplitShares) -> list[tuple[str, float]]:
    return [("train", shares.train), ("val", shares.val), ("test", shares.test)]


def _lack(wanted: dict[str, float]) -> float:
    return sum(wanted.values())


def _shuffle_key(seed: int, group: str) -> bytes:
    return hashlib.sha256(f"{seed}\n{group}".encode()).digest()
