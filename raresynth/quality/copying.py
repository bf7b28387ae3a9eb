"""Whether a generator repeats its training images.

Encoder features forget position on purpose, so copies are looked for in pixels: small pictures, normalised for
brightness and contrast, compared over the eight flips and turns and over small shifts. What counts is not the
distance itself (an average-looking image is near everything) but the distance to the nearest training image divided
by the mean distance to the next few, as Carlini et al. 2023 (section 4.2) do for diffusion models.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from raresynth.dataset.images import Pixels
from raresynth.quality.distances import Z_95

SIDE = 32
"""Side in pixels of the images that are compared."""
MARGIN = 2
"""Shifts of up to 2 pixels each way are tried."""
CELL = 4
"""Pixels are averaged over cells of this side."""
NEXT_GROUPS = 5
MIN_UNSEEN = 20
"""Groups of unseen reals."""
PAIRS_AT_ONCE = 2**22
"""Distances held at a time: all pairs of a class's images would not fit the memory."""
Array = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]


class NearerShare(NamedTuple):
    """Share of pairs of a synthetic and a real image in which the synthetic one is the nearer, with 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class CopyingFigures:
    """Outcome of the copying check for M synthetic images.

    Attributes:
        relative: (M,) distance to the nearest train group / mean distance to the next ones.
        nearest: (M,) index of the nearest train image.
        n_near_copies: how many relative distances are under the threshold.
        authenticity: Alaa et al. 2022: share of synthetic images farther from their nearest train image than that
            image is from the nearest train image of another group.
        reals: (U,) relative distances of unseen reals; with fewer than 20 groups of these, whose scatter would tell too
            little, (N,) of the train images, each against the other groups.
        unseen: whether these are the unseen ones.
        nearer: `nearer_share` of the synthetic images against these.
    """

    relative: Array
    nearest: Integers
    n_near_copies: int
    authenticity: float
    reals: Array
    unseen: bool
    nearer: NearerShare


def check_copying(
    synthetic: Pixels,
    train: Pixels,
    train_groups: Integers,
    unseen: Pixels,
    unseen_groups: Integers,
    threshold: float,
) -> CopyingFigures:
    """Compare synthetic images with the train images of their class.

    Args:
        synthetic, train, unseen: uint8 (M, 32, 32, 3), (N, 32, 32, 3), (U, 32, 32, 3).
        train_groups: group number of each train image, 0 to G - 1, G >= 3; `unseen_groups` alike, of the unseen ones.
        threshold: relative distances under it count as near copies.
    """
    reference = _signatures(train[:, MARGIN:-MARGIN, MARGIN:-MARGIN])
    own = _nearest(train, reference, train_groups, train_groups)
    found = _nearest(synthetic, reference, train_groups)
    enough = len(np.unique(unseen_groups)) >= MIN_UNSEEN
    reals = _nearest(unseen, reference, train_groups).relative if enough else own.relative
    return CopyingFigures(
        relative=found.relative,
        nearest=found.index,
        n_near_copies=int((found.relative < threshold).sum()),
        authenticity=float((found.distance > own.distance[found.index]).mean()),
        reals=reals,
        unseen=enough,
        nearer=nearer_share(found.relative, reals, unseen_groups if enough else train_groups),
    )


def relative_distances(images: Pixels, train: Pixels, train_groups: Integers) -> Array:
    """(M,) distance of each image to its nearest train group / mean distance to the next ones; arguments as above."""
    reference = _signatures(train[:, MARGIN:-MARGIN, MARGIN:-MARGIN])
    return _nearest(images, reference, train_groups).relative


def row_blocks(rows: int, columns: int) -> Iterator[slice]:
    """Slices of the rows of a matrix (rows, columns), as even as can be, of at most PAIRS_AT_ONCE entries or one row.

    Even, so that no single row is left over: products of one row round differently from those of several.
    """
    count = -(-rows // max(1, PAIRS_AT_ONCE // columns))
    for block in range(count):
        yield slice(rows * block // count, rows * (block + 1) // count)


def wilson_interval(count: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share of which `count` in `n` were seen."""
    share, z2 = count / n, Z_95**2
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z_95 * float(np.sqrt(share * (1 - share) / n + z2 / (4 * n * n))) / (1 + z2 / n)
    return (max(0.0, middle - half) if count else 0.0), (min(1.0, middle + half) if count < n else 1.0)


def nearer_share(synthetic: Array, reals: Array, groups: Integers) -> NearerShare:
    """Share of all pairs of a synthetic image and a real in which the synthetic one's distance is less; ties are half.

    0.5 where the generator does not copy, 1 where it does nothing else. C_T (Meehan et al. 2020) is this share as a
    z-score, so that with images enough it would reject whatever lies above 0.5, by however little. The interval is that
    of DeLong et al. 1988, with reals of one group, which are alike, taken together (Obuchowski 1997).

    Args:
        synthetic, reals: relative distances (M,), (U,).
        groups: (U,) group number of each real, 0 to G - 1, G >= 2.
    """
    of_synthetic, of_reals = 1 - _share_below(synthetic, reals), _share_below(reals, synthetic)
    value, m, n_groups = float(of_reals.mean()), len(synthetic), int(groups.max()) + 1
    by_group = np.bincount(groups, weights=of_reals - value)
    variance = np.square(of_synthetic - value).sum() / (m * (m - 1))
    variance += np.square(by_group).sum() / len(reals) ** 2 * n_groups / (n_groups - 1)
    half = Z_95 * float(np.sqrt(variance))
    return NearerShare(value, max(0.0, value - half), min(1.0, value + half))


def _share_below(values: Array, others: Array) -> Array:
    """Of each value the share of the others that are less, those that are equal counted by half."""
    ordered = np.sort(others)
    sides = [np.searchsorted(ordered, values, side) for side in ("left", "right")]
    return np.asarray((sides[0] + sides[1]) / (2 * len(others)))


def _signatures(images: Pixels) -> npt.NDArray[np.float32]:
    """Cell means (N, cells^2 x 3) of uint8 images, without their mean colour and with unit contrast."""
    n, side = images.shape[:2]
    cells = side // CELL
    means = images.astype(np.float32).reshape(n, cells, CELL, cells, CELL, 3).mean((2, 4))
    means -= means.mean((1, 2), keepdims=True)
    flat = means.reshape(n, -1)
    return np.asarray(flat / (flat.std(1, keepdims=True) + 5.0), dtype=np.float32)


def _distances(images: Pixels, reference: npt.NDArray[np.float32]) -> Array:
    """Least distance of each image (M, 32, 32, 3), over flips, turns and shifts, to each reference signature."""
    side = SIDE - 2 * MARGIN
    offsets = range(2 * MARGIN + 1)
    least = np.full((len(images), len(reference)), np.inf, np.float32)
    square = np.square(reference).sum(1)
    for top in offsets:
        for left in offsets:
            crop = images[:, top : top + side, left : left + side]
            for turn in range(4):
                turned = np.rot90(crop, turn, (1, 2))
                for view in (turned, turned[:, :, ::-1]):
                    signature = _signatures(view)
                    squared = np.square(signature).sum(1)[:, None] + square - 2 * signature @ reference.T
                    np.minimum(least, squared, out=least)
    return np.sqrt(np.maximum(least, 0)).astype(np.float64)


@dataclass(frozen=True)
class _Nearest:
    """For M images: relative distance, and index of and distance to the nearest train image, each (M,)."""

    relative: Array
    index: Integers
    distance: Array


def _nearest(
    images: Pixels, reference: npt.NDArray[np.float32], groups: Integers, own_groups: Integers | None = None
) -> _Nearest:
    """Distance to the nearest group / mean of the next five, and the nearest image.

    A group's distance is that of its nearest image, so that two pictures of one lesion do not hide a copy.

    Args:
        images: (M, 32, 32, 3).
        reference: signatures of the N train images.
        groups: (N,).
        own_groups: (M,) the group that each image itself belongs to, and is not compared with.
    """
    order = np.argsort(groups, kind="stable")
    starts = np.flatnonzero(np.diff(groups[order], prepend=-1))
    others = len(starts) - (own_groups is not None)
    m = len(images)
    nearest = _Nearest(np.empty(m), np.empty(m, np.int64), np.empty(m))
    for rows in row_blocks(m, len(reference)):
        distances = _distances(images[rows], reference)
        if own_groups is not None:
            distances[own_groups[rows, None] == groups] = np.inf
        by_group = np.minimum.reduceat(distances[:, order], starts, axis=1)
        ranked = np.sort(by_group, axis=1)[:, : min(NEXT_GROUPS + 1, others)]
        nearest.relative[rows] = ranked[:, 0] / np.maximum(ranked[:, 1:].mean(1), 1e-9)
        nearest.index[rows] = distances.argmin(1)
        nearest.distance[rows] = distances.min(1)
    return nearest
