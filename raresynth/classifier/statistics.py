"""Classification figures over weighted samples, and their grouped bootstrap.

A bootstrap resample is a count for each image, so all resamples are one matrix of weights and every figure is a
few matrix products. The point estimate is the same code with all weights 1.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

HEADLINE = ("balanced_accuracy", "accuracy", "macro_f1", "macro_auc", "calibration_error")
PER_CLASS = ("recall", "f1", "auc")
CALIBRATION_BINS = 15
_WEIGHTS_AT_ONCE = 2_000_000


@dataclass(frozen=True)
class Figures:
    """Figures of R weightings of the same predictions.

    Attributes:
        headline: each of HEADLINE, shape (R,); calibration_error lies in [0, 1], 0 is best, the others' best is 1.
        per_class: each of PER_CLASS, shape (R, C); NaN where the weights leave a class without an image.
    """

    headline: Mapping[str, Floats]
    per_class: Mapping[str, Floats]


def figures(targets: Integers, probabilities: Floats, weights: Floats | None = None) -> Figures:
    """Figures of one model's predictions under R weightings.

    Macro figures are means over the classes that a weighting leaves with an image, as in scikit-learn.

    Args:
        targets: class indices (N,).
        probabilities: (N, C), rows add up to 1.
        weights: non-negative (R, N); one row of ones if left out.
    """
    if weights is None:
        weights = np.ones((1, len(targets)))
    classes = probabilities.shape[1]
    confusion = confusion_matrices(targets, probabilities, weights)
    total = weights.sum(1)
    hits = np.diagonal(confusion, axis1=1, axis2=2)
    actual, predicted = confusion.sum(2), confusion.sum(1)
    with np.errstate(invalid="ignore"):
        recall = hits / actual
        # A class that is absent yet predicted has F1 0; one neither present nor predicted has none.
        f1 = 2 * hits / (actual + predicted)
    auc = np.stack([_auc(targets == c, probabilities[:, c], weights) for c in range(classes)], 1)
    headline = {
        "balanced_accuracy": _mean_of_present(recall),
        "accuracy": hits.sum(1) / total,
        "macro_f1": _mean_of_present(f1),
        "macro_auc": _mean_of_present(auc),
        "calibration_error": _calibration_error(targets, probabilities, weights),
    }
    return Figures(headline, {"recall": recall, "f1": f1, "auc": auc})


def _mean_of_present(per_class: Floats) -> Floats:
    present = ~np.isnan(per_class)
    with np.errstate(invalid="ignore"):
        mean: Floats = np.where(present, per_class, 0.0).sum(1) / present.sum(1)
    return mean


def confusion_matrices(targets: Integers, probabilities: Floats, weights: Floats) -> Floats:
    """Weighted confusion matrices (R, C, C): rows are true classes, columns predicted ones."""
    classes = probabilities.shape[1]
    cell = targets * classes + probabilities.argmax(1)
    confusion: Floats = (weights @ np.eye(classes * classes)[cell]).reshape(-1, classes, classes)
    return confusion


def _auc(positive: npt.NDArray[np.bool_], scores: Floats, weights: Floats) -> Floats:
    """Weighted area under the ROC curve, one class against the rest; ties count half (Mann-Whitney)."""
    order = np.argsort(scores, kind="stable")
    ties = np.flatnonzero(np.diff(scores[order], prepend=-np.inf))  # where each new score begins
    weights, positive = weights[:, order], positive[order]
    positives, negatives = (np.add.reduceat(weights * of, ties, axis=1) for of in (positive, ~positive))
    won = (positives * (np.cumsum(negatives, axis=1) - negatives / 2)).sum(1)
    with np.errstate(invalid="ignore"):
        area: Floats = won / (positives.sum(1) * negatives.sum(1))
    return area


def _calibration_error(targets: Integers, probabilities: Floats, weights: Floats) -> Floats:
    """Expected calibration error over equally wide bins of confidence (Guo et al. 2017, equation 3)."""
    confidence = probabilities.max(1)
    gap = confidence - (probabilities.argmax(1) == targets)
    bins = np.minimum((confidence * CALIBRATION_BINS).astype(np.int64), CALIBRATION_BINS - 1)
    sums = weights @ (np.eye(CALIBRATION_BINS)[bins] * gap[:, None])
    error: Floats = np.abs(sums).sum(1) / weights.sum(1)
    return error


def bootstrap_weights(groups: npt.NDArray[np.str_], samples: int, seed: int) -> Iterator[Floats]:
    """Weights of bootstrap resamples that draw whole groups with replacement.

    Args:
        groups: group of each image (N,); images of one group always come together.
        samples: resamples altogether.

    Yields:
        (rows, N) matrices of counts, `samples` rows in all, in pieces of bounded memory.
    """
    names, group_of = np.unique(groups, return_inverse=True)
    generator = np.random.default_rng([seed, len(names)])
    rows = max(1, _WEIGHTS_AT_ONCE // len(groups))
    for start in range(0, samples, rows):
        size = min(rows, samples - start)
        counts = generator.multinomial(len(names), np.full(len(names), 1 / len(names)), size=size)
        yield counts[:, group_of].astype(np.float64)


def bootstrap(
    targets: Integers, predictions: Mapping[str, Floats], groups: npt.NDArray[np.str_], samples: int, seed: int
) -> dict[str, Figures]:
    """Figures of several models under the same grouped resamples, so that differences are paired.

    Args:
        targets: class indices (N,).
        predictions: probabilities (N, C) of each model.
        groups: group of each image (N,).
    """
    pieces: dict[str, list[Figures]] = {name: [] for name in predictions}
    for weights in bootstrap_weights(groups, samples, seed):
        for name, probabilities in predictions.items():
            pieces[name].append(figures(targets, probabilities, weights))
    return {
        name: Figures(
            {metric: np.concatenate([part.headline[metric] for part in parts]) for metric in HEADLINE},
            {metric: np.concatenate([part.per_class[metric] for part in parts]) for metric in PER_CLASS},
        )
        for name, parts in pieces.items()
    }


def interval(resamples: Floats) -> tuple[float, float]:
    """Percentile 95 % interval of a figure's resamples; those without a value are left out."""
    low, high = np.nanpercentile(resamples, [2.5, 97.5])
    return float(low), float(high)


def fit_temperature(logits: Floats, targets: Integers) -> float:
    """Temperature that minimises the mean cross-entropy of logits / T (Guo et al. 2017), within [0.05, 20].

    The loss is convex in 1 / T, so its derivative's only zero is found by bisection.

    Args:
        logits: (N, C).
        targets: class indices (N,).
    """
    chosen = logits[np.arange(len(targets)), targets]
    low, high = np.log(0.05), np.log(20.0)
    for _ in range(60):
        middle = (low + high) / 2
        # d loss / d(1/T): what the softmax expects of the logit minus the true class's logit.
        slope = float(((softmax(logits / np.exp(middle)) * logits).sum(1) - chosen).mean())
        low, high = (middle, high) if slope > 0 else (low, middle)
    return float(np.exp((low + high) / 2))


def softmax(logits: Floats) -> Floats:
    """Probabilities (N, C) of logits (N, C)."""
    exponentials = np.exp(logits - logits.max(1, keepdims=True))
    probabilities: Floats = exponentials / exponentials.sum(1, keepdims=True)
    return probabilities
