"""How much of the reals the fakes reach, and the other way about, by nearest neighbours."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Neighbourhood:
    """Precision, recall (Kynkäänniemi et al. 2019), density, coverage (Naeem et al. 2020); only density can pass 1."""

    precision: float
    recall: float
    density: float
    coverage: float


def n_neighbours(n: int) -> int:
    """K for sets of n images: 5, or 3 under 200 images, never more than n - 1."""
    return min(5 if n >= 200 else 3, n - 1)


def squared_distances(x: npt.ArrayLike, y: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Squared Euclidean distances between the rows of x (N, D) and y (M, D): (N, M)."""
    a, b = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    squared = np.square(a).sum(1)[:, None] + np.square(b).sum(1)[None] - 2 * a @ b.T
    return np.asarray(np.maximum(squared, 0.0))


def neighbourhood(real: npt.ArrayLike, fake: npt.ArrayLike) -> Neighbourhood:
    """The four measures of fakes (N, D) against as many reals (N, D), k from `n_neighbours(N)`.

    Raises:
        ValueError: the numbers differ; the measures depend on them.
    """
    between = squared_distances(real, fake)
    n, m = between.shape
    if n != m:
        raise ValueError(f"precision and its kin need as many fakes as reals, not {m} and {n}")
    k = n_neighbours(n)
    # The distance of an image to itself is the first of its row, so entry k is the k-th neighbour's.
    real_radius = np.partition(squared_distances(real, real), k, axis=1)[:, k]
    fake_radius = np.partition(squared_distances(fake, fake), k, axis=1)[:, k]
    inside_real = between <= real_radius[:, None]
    return Neighbourhood(
        precision=float(inside_real.any(0).mean()),
        recall=float((between <= fake_radius[None]).any(1).mean()),
        density=float(inside_real.sum(0).mean() / k),
        coverage=float((between.min(1) <= real_radius).mean()),
    )
