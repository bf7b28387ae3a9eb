"""Whether what is asked for looks like what the models learned from; keeps numbers of the newest images, no image."""

from collections import deque
from typing import Any

import numpy as np
import numpy.typing as npt

from raresynth.bundle.reference import BINS, input_statistics
from raresynth.dataset.images import Pixels

ENOUGH = 300
"""Images below which nothing is said: the index of so few would be noise. Of HAM10000's test images, 100 reach 0.37,
300 at most 0.12 and 500 at most 0.07 (99 % quantiles); 300 smartphone photographs reach 1.5, chest X-rays 6."""
Counts = npt.NDArray[np.float64]


def stability_index(found: Counts, expected: Counts) -> float:
    """Population stability index of two histograms: 0 if alike; above 0.2 is commonly called a shift."""
    # Half a count in each bin, as if seen: empty bins would make it infinite.
    p, q = (counts + 0.5 for counts in (found, expected))
    p, q = p / p.sum(), q / q.sum()
    return float(((p - q) * np.log(p / q)).sum())


def beyond_chance(found: Counts, expected: Counts) -> float:
    """`stability_index` less what is to be expected of two samples of one distribution; never below 0.

    That is (bins - 1) (1/n + 1/m) (Yurdakul 2018). Beside few training images it is much: 0.2 for 20 bins and 100.
    """
    bins = np.count_nonzero(found + expected)
    chance = max(0, bins - 1) * (1 / found.sum() + 1 / expected.sum())
    return max(0.0, stability_index(found, expected) - float(chance))


class Drift:
    """The newest predictions beside the training data."""

    def __init__(self, reference: dict[str, Any], labels: list[str], window: int) -> None:
        """Start empty.

        Args:
            window: images that are remembered.
        """
        self._inputs = {name: np.array(histogram["counts"], float) for name, histogram in reference["inputs"].items()}
        predicted = reference.get("predicted")  # bundles of older versions do not tell
        self._labels = None if predicted is None else np.array([predicted[label] for label in labels], float)
        self._seen: deque[tuple[int, dict[str, float], bool]] = deque(maxlen=window)

    def add(self, pixels: Pixels, labels: npt.NDArray[np.int64], flagged: list[bool]) -> None:
        """Remember images (n, R, R, 3), the numbers of their predicted labels, and whether they were flagged."""
        statistics = input_statistics(pixels)
        for row, (label, flag) in enumerate(zip(labels.tolist(), flagged, strict=True)):
            self._seen.append((label, {name: float(values[row]) for name, values in statistics.items()}, flag))

    def indices(self) -> dict[str, float]:
        """`beyond_chance` of each input statistic and of the predicted labels; none until there are enough images."""
        seen = list(self._seen)
        if len(seen) < ENOUGH:
            return {}
        found = {
            name: np.histogram([entry[1][name] for entry in seen], bins=BINS, range=(0.0, 1.0))[0].astype(float)
            for name in self._inputs
        }
        indices = {name: beyond_chance(found[name], self._inputs[name]) for name in found}
        if self._labels is not None:
            counts = np.bincount([entry[0] for entry in seen], minlength=len(self._labels)).astype(float)
            indices["label"] = beyond_chance(counts, self._labels)
        return indices

    def flagged_share(self) -> float | None:
        """Share of the remembered images that were flagged as out of distribution; None until there are enough."""
        seen = list(self._seen)
        return float(np.mean([entry[2] for entry in seen])) if len(seen) >= ENOUGH else None
