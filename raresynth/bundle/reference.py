"""What a classifier's inputs and outputs look like on its own data: the yardstick for drift and strangeness."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from raresynth.bundle.predictor import BATCH, Predictor
from raresynth.dataset.images import Pixels

BINS = 20
GRID = 64
"""Input statistics look at every k-th pixel of either side, as long as at least so many are left: of the more that a
large image has they would change by less than a tenth of a bin, and the service would pay for each."""
Floats = npt.NDArray[np.float64]


def input_statistics(images: Pixels) -> dict[str, Floats]:
    """Brightness, contrast and mean of each colour channel, in [0, 1], of uint8 images (n, R, R, 3)."""
    step = max(1, images.shape[1] // GRID)
    values = images[:, ::step, ::step].reshape(len(images), -1, 3).astype(np.float32) / np.float32(255.0)
    # Means as products: numpy's own over three channels take fifteen times as long, and the service needs them often.
    n = values.shape[1]
    channels = np.full(n, 1 / n, np.float32) @ values
    brightness = channels.mean(axis=1)
    grey = values @ np.full(3, 1 / 3, np.float32) - brightness[:, None]
    contrast = np.sqrt(np.einsum("ij,ij->i", grey, grey) / n)
    columns = [brightness, contrast, *channels.T]
    names = ("brightness", "contrast", "red", "green", "blue")
    return {name: np.asarray(column, np.float64) for name, column in zip(names, columns, strict=True)}


def pooled(features: npt.NDArray[np.float32]) -> Floats:
    """A feature map (n, channels, height, width) or tokens (n, tokens, channels) as one vector an image."""
    axes = {4: (2, 3), 3: (1,)}.get(features.ndim, ())
    return np.asarray(features.mean(axis=axes) if axes else features, np.float64)


def strangeness(features: Floats, mean: Floats, precision: Floats) -> Floats:
    """Squared Mahalanobis distance of feature vectors (n, d) to the train images' mean (Lee et al., 2018)."""
    centred = features - mean
    return np.asarray((centred @ precision * centred).sum(axis=1))


def build_reference(predictor: Predictor, train: Pixels, train_labels: list[str], val: Pixels) -> dict[str, Any]:
    """reference.json of a bundle.

    Args:
        train: uint8 (n, R, R, 3), the real train images at the classifier's resolution.
        val: likewise, images that the classifier has not learned from.
    """
    from sklearn.covariance import LedoitWolf

    train_features = np.concatenate([pooled(predictor.predict(chunk).features) for chunk in _chunks(train)])
    val_predictions = [predictor.predict(chunk) for chunk in _chunks(val)]
    val_features = np.concatenate([pooled(prediction.features) for prediction in val_predictions])
    probabilities = np.concatenate([prediction.probabilities for prediction in val_predictions])
    fit = LedoitWolf().fit(train_features)
    mean, precision = fit.location_.round(6), fit.precision_.round(6)
    scores = strangeness(val_features, mean, precision)
    labels = predictor.bundle.labels
    predicted = np.bincount(probabilities.argmax(axis=1), minlength=len(labels))
    return {
        "n_train": len(train),
        "n_val": len(val),
        "class_priors": {label: train_labels.count(label) / len(train_labels) for label in labels},
        # Not the priors: a classifier trained on balanced batches names rare classes far more often.
        "predicted": dict(zip(labels, predicted.tolist(), strict=True)),
        "confidence": _histogram(probabilities.max(axis=1)),
        "inputs": {name: _histogram(values) for name, values in input_statistics(np.asarray(train)).items()},
        "features": {"mean": mean.tolist(), "precision": precision.tolist()},
        "strangeness": {f"q{q}": round(float(np.quantile(scores, q / 100)), 6) for q in (50, 95, 99)},
    }


def _chunks(images: Pixels) -> Iterator[Pixels]:
    for first in range(0, len(images), BATCH):
        yield np.asarray(images[first : first + BATCH])


def _histogram(values: Floats) -> dict[str, Any]:
    counts, edges = np.histogram(values, bins=BINS, range=(0.0, 1.0))
    return {"edges": edges.round(6).tolist(), "counts": counts.tolist()}
