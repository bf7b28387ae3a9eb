"""What tells the arms apart: which images a step draws, how they are augmented, what a mistake costs.

Everything else (network, steps, schedule, initial weights) is the same for all arms. A draw is a function of
(seed, step) alone, so training resumes anywhere without stored random state.
"""

from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Arm:
    """One way of training a classifier on imbalanced classes."""

    balanced: bool = False
    """Draw every class equally often instead of every image."""
    weighted: bool = False
    """Weight the loss of an image by the inverse frequency of its class."""
    strong: bool = False
    """Augment strongly."""
    synthetic: bool = False
    """Add the accepted synthetic images."""
    real: bool = True
    """Train on real images; the arm without them takes all synthetic ones, accepted or not."""


ARMS = {
    "real": Arm(),
    # The metric that matters most here counts classes equally, so the strongest real arms draw them equally too.
    "real+strong-augmentation": Arm(balanced=True, strong=True),
    "real+weights": Arm(weighted=True),
    "real+balanced-sampling": Arm(balanced=True),
    "real+synthetic": Arm(balanced=True, synthetic=True),
    # Never shipped: what it reaches on real images is the classification accuracy score (Ravuri and Vinyals 2019).
    "synthetic": Arm(balanced=True, synthetic=True, real=False),
}


@dataclass(frozen=True)
class Pool:
    """Training images as the sampler sees them."""

    targets: Indices
    """Class index of each image, shape (N,)."""
    synthetic: npt.NDArray[np.bool_]
    """Whether each image is synthetic, shape (N,)."""
    classes: int

    @cached_property
    def members(self) -> list[tuple[Indices, Indices]]:
        """Positions of each class's real and of its synthetic images."""
        of_class = [self.targets == target for target in range(self.classes)]
        return [(np.flatnonzero(own & ~self.synthetic), np.flatnonzero(own & self.synthetic)) for own in of_class]


def draw(pool: Pool, arm: Arm, batch_size: int, synthetic_share: float, seed: int, step: int) -> Indices:
    """Positions in the pool of one training batch, shape (batch_size,).

    Without balancing, the stream of batches is shuffled epoch after shuffled epoch. With it, classes take turns,
    so that each is drawn equally often, and each class's images come in shuffled epochs of their own. Where a
    class has synthetic images, they take `synthetic_share` of its turns.
    """
    start = step * batch_size
    if not arm.balanced:
        return _shuffled(len(pool.targets), (seed, 0), start, start + batch_size)
    batch = np.empty(batch_size, np.int64)
    positions = np.arange(start, start + batch_size)
    for target in range(pool.classes):
        mine = positions % pool.classes == target
        if mine.any():
            turns = positions[mine] // pool.classes
            batch[mine] = _take_turns(pool, target, synthetic_share, seed, turns)
    return batch


def _take_turns(pool: Pool, target: int, synthetic_share: float, seed: int, turns: Indices) -> Indices:
    real, synthetic = pool.members[target]
    share = synthetic_share if len(synthetic) else 0.0
    if not len(real):
        share = 1.0
    # Of the first t turns floor(t * share) are synthetic, so the turn's number says which image of which kind is due.
    before, after = np.floor(turns * share).astype(np.int64), np.floor((turns + 1) * share).astype(np.int64)
    is_synthetic = after > before
    images = np.empty(len(turns), np.int64)
    for kind, members, chosen, index in (
        (1, real, ~is_synthetic, turns - before),
        (2, synthetic, is_synthetic, before),
    ):
        if chosen.any():
            due = index[chosen]
            images[chosen] = members[_shuffled(len(members), (seed, kind, target), int(due[0]), int(due[-1]) + 1)]
    return images


def _shuffled(n: int, seed: tuple[int, ...], start: int, stop: int) -> Indices:
    """Elements start..stop of an endless sequence of shuffled epochs of range(n)."""
    epochs = range(start // n, (stop - 1) // n + 1)
    sequence = np.concatenate([_epoch(n, (*seed, epoch)) for epoch in epochs])
    return sequence[start - epochs[0] * n :][: stop - start]


@lru_cache(maxsize=256)
def _epoch(n: int, seed: tuple[int, ...]) -> Indices:
    return np.random.default_rng(seed).permutation(n)


def class_weights(pool: Pool) -> npt.NDArray[np.float64]:
    """Loss weight of each class: inverse frequency, N / (C n_c); 1 for all where classes are balanced."""
    counts = np.bincount(pool.targets, minlength=pool.classes)
    weights: npt.NDArray[np.float64] = len(pool.targets) / (pool.classes * np.maximum(counts, 1))
    return weights
