"""Latents: row i depends on the seed and i alone. Numpy only, so that a bundle samples without torch."""

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

CHUNK = 16
"""Images of one forward pass when sampling. Always the same, because a batch's shape may change float rounding."""

Latents = npt.NDArray[np.float32]


def latents(seed: int, first: int, n: int, dim: int, truncation: float = 1.0) -> Latents:
    """Latents of the images first .. first + n - 1; float32 of shape (n, dim).

    Args:
        truncation: their standard deviation; less than 1 gives more typical images and less variety.
    """
    rows = np.empty((n, dim), np.float32)
    for row, index in zip(rows, range(first, first + n), strict=True):
        key = np.array([seed, index], np.uint64)
        np.random.Generator(np.random.Philox(key=key)).standard_normal(out=row, dtype=np.float32)
    return rows * np.float32(truncation)


def aligned_chunks(indices: Sequence[int]) -> Iterator[tuple[int, list[int]]]:
    """Split ascending indices into runs that share a chunk [first, first + CHUNK), `first` a multiple of CHUNK.

    Yields:
        first index of the chunk, and the asked indices' rows in it.
    """
    chunks: dict[int, list[int]] = {}
    for index in indices:
        chunks.setdefault(index - index % CHUNK, []).append(index % CHUNK)
    yield from chunks.items()
