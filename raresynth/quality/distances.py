"""Distances between two sets of features, and intervals that say how far to trust them.

FD is the Fréchet distance of Heusel et al. 2017 (equation 6), KID the unbiased squared maximum mean discrepancy of
Bińkowski et al. 2018 with the kernel (x·y/d + 1)^3. FD's bias depends on the number of images, so FD values are
compared at equal numbers only; KID has none.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Groups = npt.NDArray[np.int64]
Z_95 = 1.959964


def frechet_distance(first: npt.ArrayLike, second: npt.ArrayLike) -> float:
    """Fréchet distance of the normal distributions fitted to two feature sets (N, D) and (M, D), N, M >= 2.

    Uses tr((S1 S2)^(1/2)) = ||X1 X2^T||_* / sqrt((N-1)(M-1)) for centred X, which stays real and exact where
    N or M is below D and the covariances are singular.
    """
    x, y = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    mean_distance = float(np.square(x.mean(0) - y.mean(0)).sum())
    root_x, root_y = _covariance_root(x), _covariance_root(y)
    overlap = float(np.linalg.svd(root_x @ root_y.T, compute_uv=False).sum())
    return mean_distance + float(np.square(root_x).sum() + np.square(root_y).sum()) - 2 * overlap


def _covariance_root(x: Array) -> Array:
    """R (min(N, D), D) with R^T R = cov(x); the nuclear norm above is the same for R as for the centred data."""
    centred = (x - x.mean(0)) / np.sqrt(len(x) - 1)
    return np.asarray(np.linalg.qr(centred, mode="r")) if len(x) > x.shape[1] else centred


def polynomial_kernel(x: Array, y: Array) -> Array:
    """KID's kernel (x·y/d + 1)^3 between the rows of x (N, D) and y (M, D): (N, M)."""
    return np.asarray((x @ y.T / x.shape[1] + 1) ** 3)


def kernel_distance(
    first: npt.ArrayLike, second: npt.ArrayLike, first_groups: Groups | None = None, second_groups: Groups | None = None
) -> float:
    """KID: unbiased MMD^2 between feature sets (N, D) and (M, D), N, M >= 2; may be slightly negative.

    Args:
        first_groups, second_groups: group number of each image; pairs within a group, which are alike because they
            show one lesion, would bias the means within a set and are left out. None: every image is its own.
    """
    (x, of_x), (y, of_y) = _sample(first, first_groups), _sample(second, second_groups)
    within = _Within.of(polynomial_kernel(x, x), of_x).mean + _Within.of(polynomial_kernel(y, y), of_y).mean
    return within - 2 * float(polynomial_kernel(x, y).mean())


def _sample(features: npt.ArrayLike, groups: Groups | None) -> tuple[Array, Groups]:
    x = np.asarray(features, dtype=np.float64)
    return x, np.arange(len(x)) if groups is None else groups


@dataclass(frozen=True)
class _Within:
    """Sum of a kernel over pairs of different groups (0 to G - 1) of one sample, and each group's share in it."""

    total: float
    pairs: int
    rows: Array
    """(G,) sum over the pairs whose first image is of the group."""
    row_pairs: Groups
    """(G,) number of those pairs."""

    @classmethod
    def of(cls, kernel: Array, groups: Groups) -> "_Within":
        kernel = np.where(groups[:, None] == groups[None], 0.0, kernel)
        sizes: Groups = np.bincount(groups)
        row_pairs = sizes * (len(kernel) - sizes)
        rows = np.bincount(groups, weights=kernel.sum(1)).astype(np.float64)
        return cls(float(kernel.sum()), int(row_pairs.sum()), rows, row_pairs)

    @property
    def mean(self) -> float:
        return self.total / self.pairs

    @property
    def means_without(self) -> Array:
        """(G,) the mean without each group."""
        return np.asarray((self.total - 2 * self.rows) / (self.pairs - 2 * self.row_pairs))


@dataclass(frozen=True)
class Estimates:
    """Two estimates that share a sample, and the covariance (2, 2) of their errors."""

    first: float
    second: float
    covariance: Array

    def interval(self) -> tuple[float, float]:
        """95 % interval of the first."""
        half = Z_95 * float(np.sqrt(self.covariance[0, 0]))
        return self.first - half, self.first + half

    def difference(self) -> tuple[float, float]:
        """Second - first, and its standard error."""
        (a, c), (_, b) = self.covariance
        return self.second - self.first, float(np.sqrt(max(a + b - 2 * c, 0.0)))

    def ratio(self) -> float | None:
        """First / second, or None where the second is not clearly above 0."""
        return self.first / self.second if self._denominator() > 0 else None

    def ratio_interval(self) -> tuple[float, float] | None:
        """Fieller's 95 % interval of first / second, or None where the second is not clearly above 0.

        The interval holds every r for which first - r second differs from 0 by less than 1.96 standard errors.
        """
        square = self._denominator()
        if square <= 0:
            return None
        (a, c), (_, _) = self.covariance
        middle = (self.first * self.second - Z_95**2 * c) / square
        constant = (self.first**2 - Z_95**2 * a) / square
        half = float(np.sqrt(max(middle**2 - constant, 0.0)))
        return middle - half, middle + half

    def _denominator(self) -> float:
        """second^2 - (1.96 standard errors)^2 where the second is positive, else something negative."""
        square = self.second**2 - Z_95**2 * float(self.covariance[1, 1])
        return square if self.second > 0 else -abs(square)


def kernel_distances(
    sample: npt.ArrayLike,
    first: npt.ArrayLike,
    second: npt.ArrayLike,
    sample_groups: Groups | None = None,
    first_groups: Groups | None = None,
    second_groups: Groups | None = None,
) -> Estimates:
    """KID(sample, first) and KID(sample, second), with the covariance of their errors.

    The covariance is the jackknife's over all three samples; images of one group (lesion, patient) are left out
    together, since they are not independent.

    Args:
        sample, first, second: features (N, D), (M, D), (L, D).
        sample_groups, first_groups, second_groups: group number of each image, 0 to G - 1, G >= 3. None: every image is
            its own.
    """
    x, of_x = _sample(sample, sample_groups)
    y, of_y = _sample(first, first_groups)
    z, of_z = _sample(second, second_groups)
    xx = _Within.of(polynomial_kernel(x, x), of_x)
    yy = _Within.of(polynomial_kernel(y, y), of_y)
    zz = _Within.of(polynomial_kernel(z, z), of_z)
    xy, xz = polynomial_kernel(x, y), polynomial_kernel(x, z)
    over_sample = xx.means_without - 2 * np.stack([_means_without(xy, of_x), _means_without(xz, of_x)])
    over_first = yy.means_without - 2 * _means_without(xy.T, of_y)
    over_second = zz.means_without - 2 * _means_without(xz.T, of_z)
    covariance = _jackknife_covariance(over_sample)
    covariance[0, 0] += _jackknife_covariance(over_first[None])[0, 0]
    covariance[1, 1] += _jackknife_covariance(over_second[None])[0, 0]
    to_first, to_second = xx.mean + yy.mean - 2 * float(xy.mean()), xx.mean + zz.mean - 2 * float(xz.mean())
    return Estimates(to_first, to_second, covariance)


def _means_without(kernel: Array, groups: Groups) -> Array:
    """(G,) mean of a kernel (N, M) between two samples without each group of rows."""
    (n, m), sizes = kernel.shape, np.bincount(groups)
    rows = np.bincount(groups, weights=kernel.sum(1))
    return np.asarray((kernel.sum() - rows) / ((n - sizes) * m))


def _jackknife_covariance(without: Array) -> Array:
    """Covariance (K, K) of K statistics from their leave-one-group-out values (K, G)."""
    groups = without.shape[1]
    centred = without - without.mean(1, keepdims=True)
    return np.asarray(centred @ centred.T * (groups - 1) / groups)
