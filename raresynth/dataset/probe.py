"""What a file of the images' folder is: its bytes, its size, whether it decodes to its end, and how it looks."""

import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import file_digest
from pathlib import Path
from types import MappingProxyType
from typing import Literal, NamedTuple, TypeVar

import numpy as np
from PIL import Image

from raresynth.dataset.images import to_rgb
from raresynth.progress import progress

HASH_SIDE = 16
"""Side of the perceptual hash: 16 x 16 = 256 bits."""
DRAFT_SIDE = 64
"""JPEG files are decoded at the smallest scale that is no smaller; the hash looks at 64 x 64 pixels."""
MAGIC = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF8", b"II*\0", b"MM\0*", b"RIFF")
DARK_BITS = 12
"""Grey images of 16 bits that use no more, as from 12-bit cameras, keep 16 of 256 grey levels when they are decoded."""
DARK_LEVELS = 16
"""An image of no more values, such as a mask, loses nothing then."""
CHUNK = 64
"""Files that a thread takes at a time."""

T = TypeVar("T")
FileDefect = Literal["missing", "empty", "not_an_image", "truncated", "too_small", "too_large", "too_dark"]


@dataclass(frozen=True)
class Probe:
    """What a file turned out to be.

    Attributes:
        defect: None for a sound image.
        detail: the defect in words.
        phash: 32 bytes, the perceptual hash of a sound image.
    """

    defect: FileDefect | None
    detail: str = ""
    phash: bytes = b""


MISSING = Probe("missing", "there is no such file, or it cannot be read")


class Facts(NamedTuple):
    """What is told of a file before it is decoded."""

    sha256: str
    """Empty without a file."""
    width: int
    height: int
    """In pixels; zeros without an image's header."""


NO_FILE = Facts("", 0, 0)


class Seen(NamedTuple):
    """All that one reading of a file tells."""

    md5: str
    facts: Facts
    probe: Probe


NOTHING_SEEN: Mapping[str, Seen] = MappingProxyType({})


def read_facts(paths: Sequence[Path]) -> Iterator[Facts]:
    """Hash every file and read its header."""
    with warnings.catch_warnings():
        # Only the header is read; the probe refuses an image that is too large to decode.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        yield from _of_each(_file_facts, paths, "read files")


def probe_files(paths: Sequence[Path], min_side: int, max_side: int) -> Iterator[Probe]:
    """Decode every file; sides are in pixels, what is larger is not decoded at all."""
    with warnings.catch_warnings():
        # PIL warns of an image that is too large to decode safely before it refuses one of twice that size.
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield from _of_each(lambda path: probe_file(path, min_side, max_side), paths, "check images")


def _of_each(look: Callable[[Path], T], paths: Sequence[Path], what: str) -> Iterator[T]:
    def look_at(chunk: Sequence[Path]) -> list[T]:
        return [look(path) for path in chunk]

    chunks = [paths[start : start + CHUNK] for start in range(0, len(paths), CHUNK)]
    with ThreadPoolExecutor(os.cpu_count()) as pool, progress(what, len(paths), "images") as advance:
        for found in pool.map(look_at, chunks):
            yield from found
            advance(len(found))


def _file_facts(path: Path) -> Facts:
    try:
        with path.open("rb") as file:
            sha256 = file_digest(file, "sha256").hexdigest()
            file.seek(0)
            try:
                with Image.open(file) as image:
                    return Facts(sha256, *image.size)
            except Exception:  # a broken file can raise anything in PIL's parsers; the probe finds out what is wrong
                return Facts(sha256, 0, 0)
    except OSError:
        return NO_FILE


def probe_file(path: Path, min_side: int, max_side: int) -> Probe:
    """Decode one file, if its header tells a size between `min_side` and `max_side` pixels."""
    try:
        with path.open("rb") as file:
            first_bytes = file.read(8)
    except OSError:
        return MISSING
    if not first_bytes:
        return Probe("empty", "the file has no bytes")
    try:
        image = Image.open(path)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        return Probe("too_large", str(error))
    except Exception:  # a broken file can raise anything in PIL's parsers
        if first_bytes.startswith(MAGIC):
            return Probe("truncated", "the file ends within its header, or the header is damaged")
        return Probe("not_an_image", "no known image format")
    with image:
        return _size_defect(image.width, image.height, min_side, max_side) or _decode(image, path)


def _size_defect(width: int, height: int, min_side: int, max_side: int) -> Probe | None:
    if min(width, height) < min_side:
        return Probe("too_small", f"{width} x {height} pixels, a side is under {min_side}")
    if max(width, height) > max_side:
        return Probe("too_large", f"{width} x {height} pixels, a side is over {max_side}")
    return None


def _decode(image: Image.Image, path: Path) -> Probe:
    try:
        return _dark(image) or Probe(None, phash=perceptual_hash(image))
    except Exception as error:  # as above
        return Probe("truncated", str(error).replace(str(path), path.name) or type(error).__name__)


def _dark(image: Image.Image) -> Probe | None:
    if not image.mode.startswith("I;16"):
        return None
    grey = np.asarray(image)
    bits = int(grey.max()).bit_length()
    if bits > DARK_BITS or len(np.unique(grey)) <= DARK_LEVELS:
        return None
    return Probe("too_dark", f"uses {bits} of its 16 bits; scale it to the full range")


def perceptual_hash(image: Image.Image) -> bytes:
    """32 bytes: of the 16 x 16 lowest frequencies of the image's 64 x 64 greys, whether each is above their median."""
    import imagehash

    image.draft("L", (DRAFT_SIDE, DRAFT_SIDE))
    image.load()
    return np.packbits(imagehash.phash(to_rgb(image).convert("L"), hash_size=HASH_SIDE).hash).tobytes()
