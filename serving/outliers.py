"""How far an image lies from the training images, by the bundle's reference."""

from typing import Any

import numpy as np

from raresynth.bundle.predictor import Floats
from raresynth.bundle.reference import pooled, strangeness


class Outliers:
    """The score of out-of-distribution images: squared Mahalanobis distance of the classifier's features.

    Attributes:
        threshold: the score that 95 % of the validation images stay under; above it an image is flagged.
    """

    def __init__(self, reference: dict[str, Any]) -> None:
        self._mean = np.array(reference["features"]["mean"])
        self._precision = np.array(reference["features"]["precision"])
        self.threshold = float(reference["strangeness"]["q95"])

    def scores(self, features: Floats) -> list[float]:
        """A score for each row of the classifier's features."""
        scores: list[float] = strangeness(pooled(features), self._mean, self._precision).tolist()
        return scores
