"""Pixels: one way of decoding and resizing, for training, measuring and serving alike. Knows no torch."""

import hashlib
import os
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from PIL import Image

from raresynth.errors import DataError
from raresynth.lineage import UNFINISHED
from raresynth.progress import progress

if TYPE_CHECKING:
    import pandas as pd

PREPROCESSING = "upright by exif or TIFF orientation, RGB, centre square, antialiased bicubic resize"
Pixels = npt.NDArray[np.uint8]
OTHER_SUFFIXES = frozenset(
    {
        *(".csv", ".tsv", ".tab", ".txt", ".md", ".rst", ".json", ".jsonl", ".yaml", ".yml", ".toml", ".xml", ".html"),
        *(".htm", ".pdf", ".doc", ".docx", ".xls", ".xlsx", ".py", ".ipynb", ".sh", ".db", ".log", ".ini", ".dvc"),
        *(".zip", ".gz", ".tar", ".7z", ".npy", ".npz", ".pkl", ".h5", ".parquet", ".md5", ".sha256"),
    }
)
"""Files that are obviously no images; any other is taken for one until decoding shows that it is not."""
GREY = 2
"""A grey pixel's channels lie at most so far apart, of 255: lossy formats leave 1."""
ORIENTATION = 0x0112
"""Exif tag."""
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""Exif orientation -> what makes the image upright."""


def may_be_image(name: str, at_top: bool) -> bool:
    """Whether a file may be an image, by its name; one without extension is none at the top of a data folder."""
    suffix = PurePosixPath(name).suffix.lower()
    return suffix not in OTHER_SUFFIXES if suffix else not at_top


def printable(path: str) -> str:
    """A path as text that can be written; bytes that are not UTF-8, as old archives hold them, are escaped."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def decode_image(source: Path | bytes, resolution: int) -> Pixels:
    """Decode an image file to uint8 of shape (resolution, resolution, 3), values 0-255.

    The largest centred square is resized with PIL's antialiased bicubic filter.

    Raises:
        DataError: the bytes are no image that can be decoded.
    """
    if isinstance(source, bytes):
        return _decode(BytesIO(source), "image", resolution)
    return _decode(source, printable(str(source)), resolution)


def _decode(file: Path | BytesIO, name: str, resolution: int) -> Pixels:
    try:
        with Image.open(file) as image:
            # JPEG files far larger than needed are decoded at a reduced scale, never below twice the target.
            image.draft("RGB", (2 * resolution, 2 * resolution))
            upright = to_rgb(image)
    except Exception as error:  # a broken file can raise anything in PIL's parsers
        raise DataError(f"{name} cannot be decoded ({error}); replace or remove it") from error
    side = min(upright.size)
    left, top = (upright.width - side) // 2, (upright.height - side) // 2
    box = (left, top, left + side, top + side)
    square = upright.resize((resolution, resolution), Image.Resampling.BICUBIC, box=box)
    return np.asarray(square, dtype=np.uint8)


def resized(images: Pixels, resolution: int) -> Pixels:
    """Square images (N, S, S, 3) at another side, by the filter of `decode_image`."""
    if images.shape[1] == resolution:
        return images
    size = (resolution, resolution)
    return np.stack([np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC)) for image in images])


def to_rgb(image: Image.Image) -> Image.Image:
    """An opened image upright and with eight bits a channel.

    PIL alone would clip 16-bit grey images, as scanners write them, to white.

    Raises:
        ValueError: pixels of 32 bits, whose range nobody can know.
    """
    image.load()  # by which PIL turns TIFFs itself, and then says that they are upright
    turn = _turn(image)
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in {"I", "F"}:
        raise ValueError("it has 32 bits a pixel, save it with 8 or 16")
    upright = image if turn is None else image.transpose(turn)
    return upright if upright.mode == "RGB" else upright.convert("RGB")  # PIL would convert it to itself by a copy


def _turn(image: Image.Image) -> Image.Transpose | None:
    try:
        return TURNS.get(image.getexif().get(ORIENTATION, 1))
    except Exception:  # damaged metadata; the pixels may be whole
        return None


def all_grey(images: Pixels) -> bool:
    """Whether no pixel of the images (N, R, R, 3) has a colour."""

    def spread(red: Pixels, green: Pixels, blue: Pixels) -> int:  # 20 times as fast as along the last axis
        most, least = np.maximum(np.maximum(red, green), blue), np.minimum(np.minimum(red, green), blue)
        return int((most - least).max())

    return all(spread(*np.moveaxis(image, -1, 0)) <= GREY for image in images)


def load_images(manifest: "pd.DataFrame", root: Path, resolution: int, cache_dir: Path | None = None) -> Pixels:
    """All images of a manifest, in its order.

    Args:
        manifest: needs the columns `path` (relative to `root`) and `sha256`.
        cache_dir: where the packed pixels are kept, so that the next stage maps them instead of decoding.

    Returns:
        uint8 of shape (len(manifest), resolution, resolution, 3); a read-only memory map with `cache_dir`.

    Raises:
        DataError: a file cannot be decoded, or is not the one that the manifest lists.
    """
    paths, hashes = [root / path for path in manifest["path"]], list(manifest["sha256"])
    if cache_dir is None:
        return _decode_all(paths, hashes, resolution, np.empty((len(paths), resolution, resolution, 3), np.uint8))
    key = hashlib.sha256("\n".join([PREPROCESSING, str(resolution), *hashes]).encode()).hexdigest()[:16]
    packed = cache_dir / f"{resolution}-{key}.npy"
    if not packed.exists():
        cache_dir.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=cache_dir, prefix=UNFINISHED, suffix=".npy")
        os.close(descriptor)
        try:
            shape = (len(paths), resolution, resolution, 3)
            out = np.lib.format.open_memmap(name, mode="w+", dtype=np.uint8, shape=shape)
            _decode_all(paths, hashes, resolution, out)
            out.flush()
            Path(name).replace(packed)
        finally:
            Path(name).unlink(missing_ok=True)
    pixels: Pixels = np.load(packed, mmap_mode="r")
    return pixels


def _decode_all(paths: Sequence[Path], hashes: Sequence[str], resolution: int, out: Pixels) -> Pixels:
    def one(index: int) -> None:
        out[index] = _decode_listed(paths[index], hashes[index], resolution)

    # PIL releases the interpreter lock while it decodes and resizes, so threads suffice.
    with ThreadPoolExecutor(os.cpu_count()) as pool, progress("read images", len(paths), "images") as advance:
        for _ in pool.map(one, range(len(paths)), chunksize=64):
            advance()
    return out


def _decode_listed(path: Path, sha256: str, resolution: int) -> Pixels:
    """Decode the very bytes that a manifest lists; a folder may change while a run goes on."""
    name = printable(str(path))
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{name} cannot be read ({error.strerror}); put it back, or start the run again") from error
    if hashlib.sha256(content).hexdigest() != sha256:
        raise DataError(f"{name} was changed after its manifest was written; start the run again")
    return _decode(BytesIO(content), name, resolution)
