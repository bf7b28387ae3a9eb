"""The reals that a class's synthetic images are held against."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd

from raresynth.errors import TooFewImages
from raresynth.quality.encoder import Features

MIN_REAL = 12
MIN_GROUPS = 8
"""Halves then have four images that do not depend on one another."""


@dataclass(frozen=True)
class Reals:
    """Features (N, D) of a class's reals, and the group number of each."""

    features: Features
    groups: npt.NDArray[np.int64]


def held_out_reals(manifest: pd.DataFrame, label: str, min_held_out: int) -> tuple[pd.DataFrame, bool]:
    """Rows of the class's val images, or of train + val where these are too few; whether so.

    Too few are images of fewer than `min_held_out` groups (FD and coverage take one image of each), or fewer than 12
    images or 8 groups. Train images please a generator that copies, so that the copying check then binds.

    Raises:
        TooFewImages: there are fewer than 12 images or 8 groups.
    """
    held_out = manifest[(manifest["label"] == label) & (manifest["split"] == "val")]
    if held_out["group"].nunique() < min_held_out or not _are_enough(held_out):
        return seen_reals(manifest, label), True
    return held_out, False


def seen_reals(manifest: pd.DataFrame, label: str) -> pd.DataFrame:
    """Rows of the class's train and val images.

    Raises:
        TooFewImages: there are fewer than 12 images or 8 groups.
    """
    real = manifest[(manifest["label"] == label) & (manifest["split"] != "test")]
    if not _are_enough(real):
        raise TooFewImages(
            f"class {label} has {len(real)} real images of {real['group'].nunique()} groups in train and val, and "
            f"measuring needs {MIN_REAL} of {MIN_GROUPS}; add images or raise validation.min_images"
        )
    return real


def _are_enough(real: pd.DataFrame) -> bool:
    return len(real) >= MIN_REAL and real["group"].nunique() >= MIN_GROUPS


def at_most(frame: pd.DataFrame, limit: int, seed: int) -> pd.DataFrame:
    """A random choice of `limit` rows, or all if there are no more."""
    if len(frame) <= limit:
        return frame
    chosen = np.random.default_rng([seed, len(frame)]).choice(len(frame), limit, replace=False)
    return frame.iloc[np.sort(chosen)]


def group_numbers(frame: pd.DataFrame) -> npt.NDArray[np.int64]:
    """Number of each row's group, from 0."""
    return np.asarray(pd.factorize(frame["group"])[0], dtype=np.int64)
