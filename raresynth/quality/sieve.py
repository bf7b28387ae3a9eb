"""Which of a generator's images are not to be used: those unlike any real, and those too like one."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from raresynth.config import SynthesisConfig
from raresynth.dataset.images import Pixels, load_images, resized
from raresynth.dataset.manifest import read_manifest
from raresynth.quality.copying import SIDE, relative_distances, row_blocks
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
        atypical = self._to_reals(features) > self._limit
        nearness = relative_distances(resized(images, SIDE), self._pixels, self._groups)
        copied = nearness < self._config.near_copy_distance
        return ["near_copy" if c else "atypical" if a else None for a, c in zip(atypical, copied, strict=True)]

    def _typical_distance(self) -> float:
        share = self._config.typical_share
        if share == 1.0:
            return float("inf")
        return float(np.quantile(self._to_reals(self._features, self._groups), share))

    def _to_reals(
        self, features: npt.NDArray[np.float32], own_groups: npt.NDArray[np.int64] | None = None
    ) -> npt.NDArray[np.float64]:
        """Squared distance (M,) of features (M, D) to their k-th nearest real, where given of no own group (M,)."""
        k = n_neighbours(len(self._features))
        kth = np.empty(len(features))
        for rows in row_blocks(len(features), len(self._features)):
            squared = squared_distances(features[rows], self._features)
            if own_groups is not None:
                squared[own_groups[rows, None] == self._groups] = np.inf
            kth[rows] = np.partition(squared, k - 1, axis=1)[:, k - 1]
        return kth
