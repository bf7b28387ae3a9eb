"""Classification figures over weighted samples, and their grouped bootstrap.

A bootstrap resample is a count for each image, so all resamples are one matrix of weights. Every figure is made of
sums of weights over sets of images that the predictions alone determine: sparse matrices, set up once a model, times
the weights. The point estimate is the same code with all weights 1.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

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
    return _Model(targets, probabilities).figures(weights)


class _Model:
    """One model's predictions, made ready for any number of weightings."""

    def __init__(self, targets: Integers, probabilities: Floats) -> None:
        self._classes = probabilities.shape[1]
        predicted, confidence = probabilities.argmax(1), probabilities.max(1)
        right = (predicted == targets).astype(np.float64)
        bins = np.minimum((confidence * CALIBRATION_BINS).astype(np.int64), CALIBRATION_BINS - 1)
        images, ones = np.arange(len(targets)), np.ones(len(targets))
        self._hits, self._actual, self._predicted = (
            _summing(rows, self._classes, images, values, len(targets))
            for rows, values in ((targets, right), (targets, ones), (predicted, ones))
        )
        self._gaps = _summing(bins, CALIBRATION_BINS, images, confidence - right, len(targets))
        self._rankings = [_Ranking(targets == c, probabilities[:, c]) for c in range(self._classes)]

    def figures(self, weights: Floats) -> Figures:
        """Figures under weights (R, N)."""
        # Each image's weights side by side, so that products with sparse matrices add up whole rows.
        columns = np.ascontiguousarray(weights.T)
        hits, actual, predicted = ((sums @ columns).T for sums in (self._hits, self._actual, self._predicted))
        # A sum and no difference, so that it is 0 where no other class is present.
        others = actual @ (1 - np.eye(self._classes))
        total = actual.sum(1)
        won = np.stack([ranking.won(columns) for ranking in self._rankings], 1)
        with np.errstate(invalid="ignore"):
            recall = hits / actual
            # A class that is absent yet predicted has F1 0; one neither present nor predicted has none.
            f1 = 2 * hits / (actual + predicted)
            auc = won / (actual * others)
        headline = {
            "balanced_accuracy": _mean_of_present(recall),
            "accuracy": hits.sum(1) / total,
            "macro_f1": _mean_of_present(f1),
            "macro_auc": _mean_of_present(auc),
            # Expected calibration error over equally wide bins of confidence (Guo et al. 2017, equation 3).
            "calibration_error": np.abs(self._gaps @ columns).sum(0) / total,
        }
        return Figures(headline, {"recall": recall, "f1": f1, "auc": auc})


class _Ranking:
    """One class against the rest: how often, under any weights, its images score above the others'.

    Row k of `_positives` sums the class's images with its k-th smallest score. Rows 0 to k of `_negatives` together
    sum the other images under that score, and half of those with the same one.
    """

    def __init__(self, positive: npt.NDArray[np.bool_], scores: Floats) -> None:
        (of_class,), (others,) = np.nonzero(positive), np.nonzero(~positive)
        steps, row = np.unique(scores[of_class], return_inverse=True)
        # One half counts from the first step at or above the score on, the other from the first one above it.
        halves = np.concatenate([np.searchsorted(steps, scores[others], side) for side in ("left", "right")])
        above = len(steps)  # the row of those that no image of the class reaches
        self._positives = _summing(row, above + 1, of_class, np.ones(len(of_class)), len(scores))
        self._negatives = _summing(halves, above + 1, np.tile(others, 2), np.full(len(halves), 0.5), len(scores))

    def won(self, columns: Floats) -> Floats:
        """Weight (R,) of pairs that the class's image wins, ties half (Mann-Whitney); weights are (N, R)."""
        won: Floats = np.einsum("kr,kr->r", self._positives @ columns, np.cumsum(self._negatives @ columns, axis=0))
        return won


def _summing(rows: Integers, n_rows: int, images: Integers, values: Floats, n: int) -> Any:
    """Sparse (n_rows, N) matrix that adds up, into each of `rows`, the weight of an image times a value."""
    from scipy.sparse import csr_array

    matrix = csr_array((values, (rows, images)), shape=(n_rows, n))
    matrix.sum_duplicates()
    return matrix


def _mean_of_present(per_class: Floats) -> Floats:
    present = ~np.isnan(per_class)
    with np.errstate(invalid="ignore"):
        mean: Floats = np.where(present, per_class, 0.0).sum(1) / present.sum(1)
    return mean


def confusion_matrices(targets: Integers, probabilities: Floats, weights: Floats) -> Floats:
    """Weighted confusion matrices (R, C, C): rows are true classes, columns predicted ones."""
    classes = probabilities.shape[1]
    cell = targets * classes + probabilities.argmax(1)
    counts = np.array([np.bincount(cell, row, classes * classes) for row in weights], dtype=np.float64)
    return counts.reshape(-1, classes, classes)


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
    for size in _pieces(samples, len(groups)):
        counts = generator.multinomial(len(names), np.full(len(names), 1 / len(names)), size=size)
        yield counts[:, group_of].astype(np.float64)


def _pieces(samples: int, n: int) -> list[int]:
    """How many of `samples` rows of n weights to hold at a time."""
    rows = max(1, _WEIGHTS_AT_ONCE // n)
    return [min(rows, samples - start) for start in range(0, samples, rows)]


def bootstrap(
    targets: Integers, predictions: Mapping[str, Floats], groups: npt.NDArray[np.str_], samples: int, seed: int
) -> dict[str, Figures]:
    """Figures of several models under the same grouped resamples, so that differences are paired.

    Args:
        targets: class indices (N,).
        predictions: probabilities (N, C) of each model.
        groups: group of each image (N,).
    """
    models = {name: _Model(targets, probabilities) for name, probabilities in predictions.items()}
    pieces: dict[str, list[Figures]] = {name: [] for name in predictions}
    for weights in bootstrap_weights(groups, samples, seed):
        for name, model in models.items():
            pieces[name].append(model.figures(weights))
    return {
        name: Figures(
            {metric: np.concatenate([part.headline[metric] for part in parts]) for metric in HEADLINE},
            {metric: np.concatenate([part.per_class[metric] for part in parts]) for metric in PER_CLASS},
        )
        for name, parts in pieces.items()
    }


def swap_margins(
    targets: Integers, first: Floats, second: Floats, groups: npt.NDArray[np.str_], samples: int, seed: int
) -> dict[str, float]:
    """What two models' figures differ by, up or down, in 95 % of draws that swap their predictions at random by group.

    Where neither is better, a group's two sets of predictions may as well be each other's: approximate randomisation
    (Noreen 1989; Yeh 2000). So a difference beyond its margin has a level of 5 % with any number of groups, where a
    bootstrap that has two or three groups of a class to draw from is too sure.

    Args:
        targets: class indices (N,).
        first, second: probabilities (N, C).
        groups: group of each image (N,); images of one group are swapped together.

    Returns:
        Each of HEADLINE -> margin.
    """
    names, group_of = np.unique(groups, return_inverse=True)
    generator = np.random.default_rng([seed, len(names), 1])
    both = _Model(np.tile(targets, 2), np.concatenate([first, second]))
    drawn: dict[str, list[Floats]] = {metric: [] for metric in HEADLINE}
    for piece, size in enumerate(_pieces(samples, 4 * len(groups))):
        own = generator.integers(0, 2, (size, len(names)))[:, group_of].astype(np.float64)
        if piece == 0:
            own[0] = 1  # the predictions as they are count as a draw (Phipson and Smyth 2010)
        one, other = (both.figures(np.hstack(shares)).headline for shares in ((own, 1 - own), (1 - own, own)))
        for metric, values in drawn.items():
            values.append(np.abs(one[metric] - other[metric]))
    return {m: float(np.quantile(np.concatenate(values), 0.95, method="higher")) for m, values in drawn.items()}


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
