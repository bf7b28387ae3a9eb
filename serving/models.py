"""The approved models of one bundle, loaded; all that a route needs to answer."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from raresynth.bundle.contents import Bundle, read_reference
from raresynth.bundle.predictor import Floats, Predictor, preprocess
from raresynth.bundle.sampler import Sampler
from raresynth.dataset.images import Pixels
from raresynth.errors import CheckpointError
from raresynth.lineage import sha256_file
from serving import metrics
from serving.activation import activation_maps
from serving.approval import open_approved
from serving.drift import Drift
from serving.errors import ApiError
from serving.outliers import Outliers
from serving.settings import Settings

TELL_EVERY = 100
"""Images after which the figures of drift are taken anew: that costs about as much as one image."""


@dataclass(frozen=True)
class Verdict:
    """What the classifier says of one image."""

    probabilities: Floats
    """(labels,)"""
    features: Floats
    """The image's row of the feature map."""
    strangeness: float


class Models:
    """The bundle's classifier, generators and reference.

    Attributes:
        bundle: the content of bundle.json.
        version: SHA-256 of bundle.json, by which the whole bundle is known.
        maps: class activation maps; None where the classifier allows none.
    """

    def __init__(self, settings: Settings) -> None:
        """Load the bundle and run each graph once.

        Raises:
            CheckpointError: the bundle is none, was changed, or holds what was not approved.
        """
        folder: Path = settings.bundle
        self.bundle: Bundle = open_approved(folder, settings.bundle_sha256)
        self.version = sha256_file(folder / "bundle.json")
        reference = read_reference(folder)
        self.outliers = Outliers(reference)
        self.drift = Drift(reference, self.bundle.labels, settings.drift_window)
        self.maps = activation_maps(folder, self.bundle)
        self._predictor = Predictor(folder, self.bundle, threads=1)
        # An image that comes alone has all cores for itself: a ResNet-18 at 224 x 224 answers in 11 ms instead of 19.
        self._lone = Predictor(folder, self.bundle, settings.threads) if settings.threads > 1 else self._predictor
        self._samplers = {label: Sampler(folder, label, self.bundle, threads=1) for label in self.bundle.generators}
        self._since_told = 0
        self._warm_up()
        self._tell_versions()

    @property
    def resolution(self) -> int:
        """Side of the classifier's input in pixels."""
        return self.bundle.classifier.resolution

    def sampler(self, label: str) -> Sampler:
        """The generator of a label.

        Raises:
            ApiError: it has no accepted one.
        """
        try:
            self.bundle.generator(label)
        except CheckpointError as error:
            raise ApiError("no_generator", str(error)) from None
        return self._samplers[label]

    def predict(self, images: Sequence[Pixels]) -> list[Verdict]:
        """Verdicts on uint8 images (R, R, 3), in one run of the graph."""
        pixels = np.stack(images)
        metrics.batch_size.observe(len(images))
        with metrics.timed("preprocess"):
            inputs = preprocess(pixels)
        with metrics.timed("model"):
            prediction = (self._lone if len(images) == 1 else self._predictor).run(inputs)
            scores = self.outliers.scores(prediction.features)
        self._count(pixels, prediction.probabilities, [score > self.outliers.threshold for score in scores])
        rows = zip(prediction.probabilities, prediction.features, scores, strict=True)
        return [Verdict(*row) for row in rows]

    def _count(self, pixels: Pixels, probabilities: Floats, flagged: list[bool]) -> None:
        best = probabilities.argmax(axis=1)
        for label, highest, flag in zip(best.tolist(), probabilities.max(axis=1).tolist(), flagged, strict=True):
            metrics.predictions.labels(self.bundle.labels[label]).inc()
            metrics.confidence.observe(highest)
            metrics.outliers.inc(flag)
        metrics.last_prediction.set_to_current_time()
        self.drift.add(pixels, best, flagged)
        self._since_told += len(flagged)
        if self._since_told >= TELL_EVERY:
            self._since_told = 0
            self._tell_drift()

    def _warm_up(self) -> None:
        """A graph's first run takes longer, and a graph that cannot run should be found now."""
        for predictor in (self._predictor, self._lone):
            predictor.predict(np.zeros((1, self.resolution, self.resolution, 3), np.uint8))
        for sampler in self._samplers.values():
            sampler.generate(0, 0, 1, 1.0)

    def _tell_versions(self) -> None:
        """Series that alerts rest on are there from the start, at 0."""
        for label in self.bundle.labels:
            metrics.predictions.labels(label)
        for label in self._samplers:
            metrics.generated.labels(label)
        metrics.model_info.labels(
            bundle=self.version,
            data_version=self.bundle.lineage.data_md5,
            classifier=self.bundle.classifier.model,
            arm=self.bundle.classifier.arm,
            generators=",".join(self._samplers),
            version=self.bundle.lineage.commit or "unknown",
        ).set(1)

    def _tell_drift(self) -> None:
        for name, index in self.drift.indices().items():
            metrics.drift.labels(name).set(index)
        if (share := self.drift.flagged_share()) is not None:
            metrics.outlier_share.set(share)
