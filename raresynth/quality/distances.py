"""Distances between two sets of features, and intervals that say how far to trust them.

FD is the Fréchet distance of Heusel et al. 2017 (equation 6), KID the unbiased squared maximum mean discrepancy of
Bińkowski et al. 2018 with the kernel (x·y/d + 1)^3. FD's bias depends on the number of images, so FD values are
compared at equal numbers only; KID has none.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
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


def kernel_distance(first: npt.ArrayLike, second: npt.ArrayLike) -> float:
    """KID: unbiased MMD^2 between feature sets (N, D) and (M, D), N, M >= 2; may be slightly negative."""
    x, y = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    return (
        _mean_off_diagonal(polynomial_kernel(x, x))
        + _mean_off_diagonal(polynomial_kernel(y, y))
        - 2 * float(polynomial_kernel(x, y).mean())
    )


def _mean_off_diagonal(kernel: Array) -> float:
    n = len(kernel)
    return float((kernel.sum() - np.trace(kernel)) / (n * (n - 1)))


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
    real: npt.ArrayLike, fake: npt.ArrayLike, other: npt.ArrayLike, real_groups: npt.NDArray[np.int64]
) -> Estimates:
    """KID(real, fake) and KID(real, other), with the covariance of their errors.

    The covariance is the jackknife's over all three samples; reals of one group (lesion, patient) are left out
    together, since they are not independent.

    Args:
        real, fake, other: features (N, D), (M, D), (L, D).
        real_groups: group number of each real, 0 to G - 1, G >= 3.
    """
    x, y, z = (np.asarray(part, dtype=np.float64) for part in (real, fake, other))
    xx = _LeftOut.within(polynomial_kernel(x, x), real_groups)
    yy = _LeftOut.within(polynomial_kernel(y, y), np.arange(len(y)))
    zz = _LeftOut.within(polynomial_kernel(z, z), np.arange(len(z)))
    k_xy, k_xz = polynomial_kernel(x, y), polynomial_kernel(x, z)
    xy, yx = _LeftOut.between(k_xy, real_groups), _LeftOut.between(k_xy.T, np.arange(len(y)))
    xz, zx = _LeftOut.between(k_xz, real_groups), _LeftOut.between(k_xz.T, np.arange(len(z)))
    over_real = np.stack([xx.without - 2 * xy.without, xx.without - 2 * xz.without])
    over_fake, over_other = yy.without - 2 * yx.without, zz.without - 2 * zx.without
    covariance = _jackknife_covariance(over_real)
    covariance[0, 0] += _jackknife_covariance(over_fake[None])[0, 0]
    covariance[1, 1] += _jackknife_covariance(over_other[None])[0, 0]
    return Estimates(xx.whole + yy.whole - 2 * xy.whole, xx.whole + zz.whole - 2 * xz.whole, covariance)


@dataclass(frozen=True)
class _LeftOut:
    """Mean of a kernel matrix, and its means without each group."""

    whole: float
    without: Array

    @classmethod
    def within(cls, kernel: Array, groups: npt.NDArray[np.int64]) -> "_LeftOut":
        """Mean over pairs of different images of one sample."""
        n, sizes = len(kernel), np.bincount(groups)
        np.fill_diagonal(kernel, 0.0)
        total = kernel.sum()
        rows = np.bincount(groups, weights=kernel.sum(1))
        own = np.bincount(groups, weights=(kernel * (groups[:, None] == groups[None])).sum(1))
        left = n - sizes
        return cls(float(total / (n * (n - 1))), (total - 2 * rows + own) / (left * (left - 1)))

    @classmethod
    def between(cls, kernel: Array, groups: npt.NDArray[np.int64]) -> "_LeftOut":
        """Mean over pairs (row, column) of two samples; groups of rows are left out."""
        (n, m), sizes = kernel.shape, np.bincount(groups)
        total, rows = kernel.sum(), np.bincount(groups, weights=kernel.sum(1))
        return cls(float(total / (n * m)), (total - rows) / ((n - sizes) * m))


def _jackknife_covariance(without: Array) -> Array:
    """Covariance (K, K) of K statistics from their leave-one-group-out values (K, G)."""
    groups = without.shape[1]
    centred = without - without.mean(1, keepdims=True)
    return np.asarray(centred @ centred.T * (groups - 1) / groups)
