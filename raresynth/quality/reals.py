"""The reals that a class's synthetic images are held against."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd

from raresynth.errors import TooFewImages
from raresynth.quality.encoder import Features

MIN_REAL = 12
MIN_GROUPS = 4


@dataclass(frozen=True)
class Reals:
    """Features (N, D) of a class's reals, and the group number of each."""

    features: Features
    groups: npt.NDArray[np.int64]


def held_out_reals(manifest: pd.DataFrame, label: str, min_held_out: int) -> tuple[pd.DataFrame, bool]:
    """Rows of the class's val images, or of train + val where these are fewer than `min_held_out`; whether so.

    Train images please a generator that copies, so that the copying check then binds.

    Raises:
        TooFewImages: there are fewer than 12 images or 4 groups.
    """
    frame = manifest[(manifest["label"] == label) & (manifest["split"] != "test")]
    held_out = frame[frame["split"] == "val"]
    binding = len(held_out) < min_held_out
    real = frame if binding else held_out
    if len(real) < MIN_REAL or real["group"].nunique() < MIN_GROUPS:
        raise TooFewImages(
            f"class {label} has {len(real)} real images of {real['group'].nunique()} groups in train and val, and "
            f"measuring needs {MIN_REAL} of {MIN_GROUPS}; add images or raise validation.min_images"
        )
    return real, binding


def at_most(frame: pd.DataFrame, limit: int, seed: int) -> pd.DataFrame:
    """A random choice of `limit` rows, or all if there are no more."""
    if len(frame) <= limit:
        return frame
    chosen = np.random.default_rng([seed, len(frame)]).choice(len(frame), limit, replace=False)
    return frame.iloc[np.sort(chosen)]


def group_numbers(frame: pd.DataFrame) -> npt.NDArray[np.int64]:
    """Number of each row's group, from 0."""
    return np.asarray(pd.factorize(frame["group"])[0], dtype=np.int64)
