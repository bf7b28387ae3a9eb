"""Which rows of a manifest cannot be used, and why. Pure functions of the manifest and the probed files."""

from collections.abc import Sequence

import pandas as pd

from raresynth.config import ValidationConfig
from raresynth.dataset.duplicates import near_duplicates
from raresynth.dataset.manifest import count_classes
from raresynth.dataset.probe import Probe

COLUMNS = ("path", "label", "reason", "detail")
"""Of quarantine.csv."""


def find_defects(rows: pd.DataFrame, probes: Sequence[Probe], near_duplicate_bits: int) -> pd.DataFrame:
    """The first defect of each row that has one.

    In this order: a file defect (see `probe.FileDefect`); `unknown_label`, the label is empty; `conflicting_label`,
    the same bytes carry several labels, and since nothing tells which is right, none is kept; `exact_duplicate`, the
    same bytes as a row with an earlier image_id; `near_duplicate`, looks like a kept row of another group with an
    earlier image_id (two views of one group may look the same).

    Args:
        rows: manifest with an index of 0, 1, ...
        probes: what was found in each row's file.

    Returns:
        columns reason and detail, indexed as the defective rows.
    """
    defects = pd.DataFrame(
        [(index, probe.defect, probe.detail) for index, probe in enumerate(probes) if probe.defect]
        + [
            (index, "unknown_label", "the image has no label")
            for index, (label, probe) in enumerate(zip(rows["label"], probes, strict=True))
            if not probe.defect and label == ""
        ],
        columns=["index", "reason", "detail"],
    ).set_index("index")
    for find in (_conflicting_labels, _exact_duplicates):
        defects = pd.concat([defects, find(rows.drop(defects.index))])
    sound = rows.drop(defects.index).sort_values(["image_id", "path"], kind="stable")
    hashes = [probes[index].phash for index in sound.index]
    near = near_duplicates(hashes, list(sound["group"]), near_duplicate_bits)
    found = {
        sound.index[later]: ("near_duplicate", f"differs in {bits} of 256 bits from {_name(sound.iloc[earlier])}")
        for later, (earlier, bits) in near.items()
    }
    return pd.concat([defects, _as_frame(found)]).sort_index()


def find_small_classes(rows: pd.DataFrame, config: ValidationConfig) -> dict[str, str]:
    """Labels of classes that are too small, and why."""
    reasons = {}
    for label, splits in count_classes(rows).items():
        n = sum(splits.values())
        split, fewest = min(splits.items(), key=lambda item: item[1])
        if n < config.min_images:
            reasons[label] = f"{n} usable images, fewer than min_images = {config.min_images}"
        elif fewest < config.min_images_per_split:
            reasons[label] = (
                f"{fewest} usable images in {split}, fewer than min_images_per_split = {config.min_images_per_split}"
            )
    return reasons


def _conflicting_labels(rows: pd.DataFrame) -> pd.DataFrame:
    labels = rows.groupby("sha256")["label"]
    conflicting = rows[labels.transform("nunique") > 1]
    names = {sha256: " and ".join(sorted(set(group))) for sha256, group in conflicting.groupby("sha256")["label"]}
    return _as_frame(
        {i: ("conflicting_label", f"the same bytes are labelled {names[rows['sha256'][i]]}") for i in conflicting.index}
    )


def _exact_duplicates(rows: pd.DataFrame) -> pd.DataFrame:
    ordered = rows.sort_values(["image_id", "path"], kind="stable")
    later = ordered[ordered.duplicated("sha256")]
    first = ordered.drop_duplicates("sha256").set_index("sha256")
    return _as_frame(
        {i: ("exact_duplicate", f"the same bytes as {_name(first.loc[rows['sha256'][i]])}") for i in later.index}
    )


def _name(row: "pd.Series[str]") -> str:
    return f"{row['path']} ({row['label']})"


def _as_frame(found: "dict[int, tuple[str, str]]") -> pd.DataFrame:
    return pd.DataFrame.from_dict(found, orient="index", columns=["reason", "detail"])
