"""Pixels: one way of decoding and resizing, for training, measuring and serving alike. Knows no torch."""

import hashlib
import os
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from raresynth.errors import DataError
from raresynth.progress import progress

if TYPE_CHECKING:
    import pandas as pd

PREPROCESSING = "exif orientation, RGB, centre square, antialiased bicubic resize"
Pixels = npt.NDArray[np.uint8]


def decode_image(source: Path | bytes, resolution: int) -> Pixels:
    """Decode an image file to uint8 of shape (resolution, resolution, 3), values 0-255.

    The largest centred square is resized with PIL's antialiased bicubic filter.

    Raises:
        DataError: the bytes are no image that can be decoded.
    """
    try:
        with Image.open(BytesIO(source) if isinstance(source, bytes) else source) as image:
            # JPEG files far larger than needed are decoded at a reduced scale, never below twice the target.
            image.draft("RGB", (2 * resolution, 2 * resolution))
            upright = _to_rgb(ImageOps.exif_transpose(image))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        name = "image" if isinstance(source, bytes) else str(source)
        raise DataError(f"{name} cannot be decoded ({error}); replace or remove it") from error
    side = min(upright.size)
    left, top = (upright.width - side) // 2, (upright.height - side) // 2
    box = (left, top, left + side, top + side)
    square = upright.resize((resolution, resolution), Image.Resampling.BICUBIC, box=box)
    return np.asarray(square, dtype=np.uint8)


def _to_rgb(image: Image.Image) -> Image.Image:
    """Eight bits a channel; PIL alone would clip 16-bit grey images, as scanners write them, to white."""
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("RGB")


def load_images(manifest: "pd.DataFrame", root: Path, resolution: int, cache_dir: Path | None = None) -> Pixels:
    """All images of a manifest, in its order.

    Args:
        manifest: needs the columns `path` (relative to `root`) and `sha256`.
        cache_dir: where the packed pixels are kept, so that the next stage maps them instead of decoding.

    Returns:
        uint8 of shape (len(manifest), resolution, resolution, 3); a read-only memory map with `cache_dir`.

    Raises:
        DataError: a file cannot be decoded.
    """
    paths = [root / path for path in manifest["path"]]
    if cache_dir is None:
        return _decode_all(paths, resolution, np.empty((len(paths), resolution, resolution, 3), np.uint8))
    key = hashlib.sha256("\n".join([PREPROCESSING, str(resolution), *manifest["sha256"]]).encode()).hexdigest()[:16]
    packed = cache_dir / f"{resolution}-{key}.npy"
    if not packed.exists():
        cache_dir.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=cache_dir, suffix=".npy")
        os.close(descriptor)
        try:
            shape = (len(paths), resolution, resolution, 3)
            out = np.lib.format.open_memmap(name, mode="w+", dtype=np.uint8, shape=shape)
            _decode_all(paths, resolution, out)
            out.flush()
            Path(name).replace(packed)
        finally:
            Path(name).unlink(missing_ok=True)
    pixels: Pixels = np.load(packed, mmap_mode="r")
    return pixels


def _decode_all(paths: Sequence[Path], resolution: int, out: Pixels) -> Pixels:
    def one(index: int) -> None:
        out[index] = decode_image(paths[index], resolution)

    # PIL releases the interpreter lock while it decodes and resizes, so threads suffice.
    with ThreadPoolExecutor(os.cpu_count()) as pool, progress("read images", len(paths), "images") as advance:
        for _ in pool.map(one, range(len(paths)), chunksize=64):
            advance()
    return out
