"""Which images a step sees: a function of the seed and the step alone, so that a resumed run sees the same."""

from functools import lru_cache
from typing import Protocol

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]


class Batches(Protocol):
    """The images of every step."""

    def images_before(self, step: int) -> int:
        """Images shown in the steps 0 .. step - 1."""

    def steps(self, images: float) -> int:
        """Fewest steps that show at least this many images."""

    def indices(self, step: int) -> Indices:
        """Indices of the images of a step (counted from 0)."""


class Draws:
    """Images drawn with replacement, image i with a probability in proportion to `weights[i]`."""

    def __init__(self, weights: npt.NDArray[np.float64], batch_size: int, seed: int) -> None:
        shares = (weights / weights.sum()).cumsum()
        self._up_to, self.batch_size, self.seed = shares / shares[-1], batch_size, seed

    def images_before(self, step: int) -> int:
        return step * self.batch_size

    def steps(self, images: float) -> int:
        return -int(-images // self.batch_size)

    def indices(self, step: int) -> Indices:
        # What Generator.choice does with p, which sums all the weights anew for every batch.
        draws = np.random.default_rng([self.seed, step]).random(self.batch_size)
        return np.searchsorted(self._up_to, draws, side="right")


class Passes:
    """Shuffled passes over `n` images.

    Args:
        wrap: fill a last, short batch from the next pass, so that every batch is full; otherwise it stays short.
    """

    def __init__(self, n: int, batch_size: int, seed: int, wrap: bool) -> None:
        self.n, self.batch_size, self.seed, self.wrap = n, batch_size, seed, wrap
        self._order = lru_cache(maxsize=2)(self._shuffled)

    def _shuffled(self, epoch: int) -> Indices:
        return np.random.default_rng([self.seed, epoch]).permutation(self.n)

    def images_before(self, step: int) -> int:
        if self.wrap:
            return step * self.batch_size
        epochs, rest = divmod(step, self._steps_per_epoch())
        return epochs * self.n + rest * self.batch_size

    def steps(self, images: float) -> int:
        if self.wrap:
            return -int(-images // self.batch_size)
        epochs, rest = divmod(images, self.n)
        return int(epochs) * self._steps_per_epoch() - int(-rest // self.batch_size)

    def indices(self, step: int) -> Indices:
        start = self.images_before(step)
        if not self.wrap:
            epoch, first = divmod(start, self.n)
            return self._order(epoch)[first : first + self.batch_size]
        positions = np.arange(start, start + self.batch_size)
        epochs = positions // self.n
        return np.concatenate(
            [self._order(int(epoch))[positions[epochs == epoch] - epoch * self.n] for epoch in np.unique(epochs)]
        )

    def _steps_per_epoch(self) -> int:
        return -(-self.n // self.batch_size)
