"""What a generator in training is worth: KID of its images to a class's train and val reals.

Not to the val ones alone: even 70 of them can lie far from the class by the chance of the split, and of several
branches the one would be chosen that chases that chance (benchmarks/README.md, "why mel went wrong"). A generator that
copies train images is found later, by the sieve and by `measure`.
"""

from functools import cache
from pathlib import Path

from raresynth.dataset.images import Pixels, load_images, resized
from raresynth.dataset.manifest import read_manifest
from raresynth.errors import TooFewImages
from raresynth.quality.distances import kernel_distance, kernel_distances
from raresynth.quality.encoder import Encoder, Features
from raresynth.quality.reals import Reals, at_most, group_numbers, seen_reals

MAX_REALS = 1000


class KidJudge:
    """Compares images with a class's train and val reals; the test split is never looked at.

    Its limits are not those of the params' section quality, a change of which would repeat all training.
    """

    def __init__(
        self,
        data_dir: Path,
        manifest_path: Path,
        encoder_dir: Path,
        seed: int,
        cache_dir: Path | None,
        device: str = "cpu",
    ) -> None:
        self._manifest = read_manifest(manifest_path)
        self._data_dir, self._seed, self._cache_dir = data_dir, seed, cache_dir
        self._encoder = Encoder.load(encoder_dir, device)
        self._reals = cache(self._read)

    def kid(self, label: str, images: Pixels) -> float | None:
        """KID of uint8 images (M, R, R, 3) to the class's reals, or None where these are too few."""
        try:
            real = self._reals(label)
        except TooFewImages:
            return None
        return kernel_distance(real.features, self._features(images), real.groups)

    def gain(self, label: str, images: Pixels, others: Pixels) -> tuple[float, float]:
        """How much lower the images' KID is than the others', and that difference's standard error (jackknife).

        Both are 0 where the class has too few reals to tell.
        """
        try:
            real = self._reals(label)
        except TooFewImages:
            return 0.0, 0.0
        kids = kernel_distances(real.features, self._features(images), self._features(others), real.groups)
        return kids.difference()

    def _read(self, label: str) -> Reals:
        frame = at_most(seen_reals(self._manifest, label), MAX_REALS, self._seed)
        pixels = load_images(frame, self._data_dir, self._encoder.resolution, self._cache_dir)
        return Reals(self._encoder.features(pixels), group_numbers(frame))

    def _features(self, images: Pixels) -> Features:
        return self._encoder.features(resized(images, self._encoder.resolution))
