"""Which of a generator's images are not to be used: those unlike any real, and those too like one."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from raresynth.config import SynthesisConfig
from raresynth.dataset.images import Pixels, load_images, resized
from raresynth.dataset.manifest import read_manifest
from raresynth.quality.copying import SIDE, relative_distances
from raresynth.quality.encoder import Encoder
from raresynth.quality.neighbours import n_neighbours, squared_distances
from raresynth.quality.reals import group_numbers

MIN_GROUPS = 6
"""With train images of fewer groups nothing is rejected: what is typical, or a copy, cannot be told."""


class TrainSieve:
    """Holds images against the train reals of their class.

    An image is atypical if its distance to its k-th nearest real, in the encoder's features, is above the
    `typical_share` quantile of the reals' own distances to theirs of other groups. It is a near copy if it lies
    nearer to one train group than `near_copy_distance` of its mean distance to the next ones, in pixels.
    """

    def __init__(
        self,
        data_dir: Path,
        manifest_path: Path,
        encoder_dir: Path,
        label: str,
        config: SynthesisConfig,
        cache_dir: Path | None,
        device: str = "cpu",
    ) -> None:
        manifest = read_manifest(manifest_path)
        train = manifest[(manifest["split"] == "train") & (manifest["label"] == label)]
        self._config, self._groups = config, group_numbers(train)
        self._enough = train["group"].nunique() >= MIN_GROUPS
        self._encoder = Encoder.load(encoder_dir, device)
        self._pixels = load_images(train, data_dir, SIDE, cache_dir)
        self._features = self._encoder.features(load_images(train, data_dir, self._encoder.resolution, cache_dir))
        self._limit = self._typical_distance() if self._enough else np.inf

    def judge(self, images: Pixels) -> Sequence[Literal["atypical", "near_copy"] | None]:
        """Why each uint8 image (M, R, R, 3) is rejected, or None."""
        if not self._enough:
            return [None] * len(images)
        features = self._encoder.features(resized(images, self._encoder.resolution))
        atypical = self._to_reals(squared_distances(features, self._features)) > self._limit
        nearness = relative_distances(resized(images, SIDE), self._pixels, self._groups)
        copied = nearness < self._config.near_copy_distance
        return ["near_copy" if c else "atypical" if a else None for a, c in zip(atypical, copied, strict=True)]

    def _typical_distance(self) -> float:
        share = self._config.typical_share
        if share == 1.0:
            return float("inf")
        own = squared_distances(self._features, self._features)
        own[self._groups[:, None] == self._groups[None]] = np.inf
        return float(np.quantile(self._to_reals(own), share))

    def _to_reals(self, squared: "np.typing.NDArray[np.float64]") -> "np.typing.NDArray[np.float64]":
        k = n_neighbours(len(self._features))
        return np.partition(squared, k - 1, axis=1)[:, k - 1]
