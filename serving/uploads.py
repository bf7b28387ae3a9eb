"""What an uploaded file must be before anything decodes it; nothing here keeps, logs or fetches an image."""

import re
import struct
import threading
import warnings
import zlib
from collections.abc import Iterator
from contextlib import nullcontext
from io import BytesIO

from PIL import Image

from raresynth.dataset.images import Pixels, decode_image
from raresynth.errors import DataError
from serving.errors import ApiError
from serving.settings import Settings

FORMATS = ("JPEG", "PNG", "WEBP")
_JPEG_START = b"\xff\xd8\xff"
_NO_FILL = re.compile(rb"[^\x00\r\n ]")
"""What may not stand behind an image."""
_START = re.compile(rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|RIFF....WEBP", re.DOTALL)
MAX_BEHIND = 8
"""Images that a camera may put behind a JPEG: previews, maps of depth and brightness."""
MAX_SCANS = 100
"""Passes of a progressive JPEG; ordinary ones have about ten, and each costs a pass over all pixels."""
MAX_SEGMENTS, MAX_FILL = 1_000, 16
"""Segments of a JPEG, and bytes between two of them before its pixels: PIL walks over both one by one, and joins Exif
segments to one another at a cost that grows with their square."""
MAX_CHUNKS, MAX_NOTES = 12_000, 100
"""Chunks of a PNG (libpng writes one for 8 kB of pixels), and those of them that hold no pixels."""
MAX_PARTS = 1_000
"""Chunks of a WebP."""
MAX_HEADERS = 3
"""Headers of Exif metadata; some writers put two."""
LARGE_PIXELS = 8_000_000
"""Pixels from which on images are decoded one at a time: a WebP of 25 megapixels needs 500 MB for it."""
_MARKER = re.compile(rb"\xff([^\x00\xd0-\xd7\xff])")
"""A JPEG marker that ends a run of compressed pixels: not an escaped 255, a restart or a fill byte."""
_SCAN, _END, _STANDALONE = 0xDA, 0xD9, frozenset({0x01, *range(0xD0, 0xD9)})
_APP1, _APP2 = 0xE1, 0xE2
_EXIF, _MPF = b"Exif\x00\x00", b"MPF\x00"
_EXIF_AS_TEXT = b"Raw profile type exif"
_UNITS = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8}
"""Type of an Exif value -> bytes of one."""
_one_large = threading.Lock()


def check_upload(content: bytes, settings: Settings) -> int:
    """Refuse what is not one whole still image of bearable size and structure, before PIL reads its pixels.

    Returns:
        its pixels, as its header tells them.

    Raises:
        ApiError: too_large, wrong_type, animated, too_many_pixels, undecodable or trailing_data.
    """
    if len(content) > settings.max_image_mb * 1e6:
        raise ApiError("too_large", f"the image has more than {settings.max_image_mb:g} MB; send a smaller one")
    if not _START.match(content):
        raise ApiError("wrong_type", "the file is no JPEG, PNG or WebP image; send one of these")
    # PIL's parsers come second: they can be made to work for minutes, or to fill the memory.
    end = {b"\xff": _jpeg_end, b"\x89": _png_end, b"R": _webp_end}[content[:1]](content)
    width, height, kind, frames = _header(content)
    if frames > 1 and kind != "MPO":  # a phone's JPEG may carry a preview as a second image
        raise ApiError("animated", f"the image has {frames} frames; send a single one")
    if width * height > settings.max_megapixels * 1e6:
        most = f"{settings.max_megapixels:g} megapixels"
        raise ApiError("too_many_pixels", f"the image has {width} x {height} pixels; send one of at most {most}")
    if content.startswith(_JPEG_START):
        end = _last_jpeg_end(content, end)
    if _NO_FILL.search(content, end):
        raise ApiError("trailing_data", "the file goes on after the image's end; save the image anew")
    return width * height


def decode_upload(content: bytes, resolution: int, settings: Settings) -> Pixels:
    """Check and decode one uploaded image to uint8 (resolution, resolution, 3), upright as its EXIF says.

    Raises:
        ApiError: it is refused or cannot be decoded.
    """
    pixels = check_upload(content, settings)
    try:
        with _one_large if pixels > LARGE_PIXELS else nullcontext():
            return decode_image(content, resolution)
    except DataError as error:
        raise _broken() from error


def _header(content: bytes) -> tuple[int, int, str, int]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of many pixels: they are counted here
            with Image.open(BytesIO(content), formats=FORMATS) as image:
                return *image.size, str(image.format), int(getattr(image, "n_frames", 1))
    except Image.DecompressionBombError as error:
        raise ApiError("too_many_pixels", "the image has far too many pixels; send a smaller one") from error
    except Exception as error:  # a broken file can raise anything in PIL's parsers
        raise _broken() from error


def _png_end(content: bytes) -> int:
    at, name, notes = 8, b"", 0
    for _ in range(MAX_CHUNKS):
        length = int.from_bytes(content[at : at + 4], "big")
        name, end = content[at + 4 : at + 8], at + 12 + length
        # PIL decodes on over damaged pixels without a word.
        if end > len(content) or zlib.crc32(content[at + 4 : end - 4]) != int.from_bytes(content[end - 4 : end], "big"):
            raise _broken()
        notes += name != b"IDAT"
        if notes > MAX_NOTES:
            break
        if name == b"eXIf":
            _check_exif(content[at + 8 : end - 4])
        if name in (b"tEXt", b"zTXt", b"iTXt") and content[at + 8 :].startswith(_EXIF_AS_TEXT):
            break
        at = end
        if name == b"IEND":
            return at
    raise _overdone()


def _webp_end(content: bytes) -> int:
    length = int.from_bytes(content[4:8], "little")
    end = 8 + length + length % 2
    if end > len(content):
        raise _broken()
    at = 12
    for _ in range(MAX_PARTS):
        size = int.from_bytes(content[at + 4 : at + 8], "little")
        if content[at : at + 4] == b"EXIF":
            _check_exif(content[at + 8 : at + 8 + size])
        at += 8 + size + size % 2
        if at >= end:
            return end
    raise _overdone()


def _last_jpeg_end(content: bytes, end: int) -> int:
    """Where the last of the images ends that lie one behind the other in a camera's JPEG.

    Their number is not asked of PIL, which knows previews, but takes a file with a gain map (Ultra HDR) for one image.
    """
    for _ in range(MAX_BEHIND):
        found = _NO_FILL.search(content, end)
        if found is None or not content.startswith(_JPEG_START, found.start()):
            break
        end = _jpeg_end(content, found.start())
    return end


def _jpeg_end(content: bytes, at: int = 0) -> int:
    exif = bytearray()
    scans = 0
    for marker, segment in _segments(content, at):
        if marker == _END:
            return segment.stop
        scans += marker == _SCAN
        if scans > MAX_SCANS:
            raise ApiError("undecodable", f"the image has more than {MAX_SCANS} scans; save it anew")
        text = content[segment.start : segment.stop] if marker in (_APP1, _APP2) else b""
        if marker == _APP1 and text.startswith(_EXIF):
            exif += text[len(_EXIF) :]  # as PIL joins them
        if marker == _SCAN and scans == 1:  # PIL reads no metadata behind it
            _check_exif(bytes(exif))
        if marker == _APP2 and text.startswith(_MPF):
            _check_exif(text[len(_MPF) :])
    raise _broken()


def _segments(content: bytes, at: int) -> Iterator[tuple[int, range]]:
    """A JPEG's markers, each with where its segment's content lies; an end of the image is an empty one."""
    at, pixels = at + 2, False
    for _ in range(MAX_SEGMENTS):
        found = _MARKER.search(content, at)
        if found is None or not (pixels or found.start() - at <= MAX_FILL):
            raise _broken()
        marker, at = found[1][0], found.end()
        length = 0 if marker in _STANDALONE or marker == _END else int.from_bytes(content[at : at + 2], "big")
        yield marker, range(min(at + 2, at + length), at + length)
        at += length
        pixels |= marker == _SCAN
    raise _overdone()


def _check_exif(tiff: bytes) -> None:
    """Refuse values that lie over one another: PIL copies each, and makes gigabytes of a few kilobytes.

    Headers one behind the other too: PIL takes one off at a time, by copying all that follows.
    """
    for _ in range(MAX_HEADERS):
        tiff = tiff.removeprefix(_EXIF)
    if tiff.startswith(_EXIF):
        raise _overdone()
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None or len(tiff) < 8:
        return  # PIL reads no further either
    at = struct.unpack_from(f"{order}L", tiff, 4)[0]
    if at + 2 > len(tiff):
        return
    copied = 0
    for first in range(at + 2, at + 2 + 12 * struct.unpack_from(f"{order}H", tiff, at)[0], 12):
        if first + 12 > len(tiff):
            return
        _, kind, count, offset = struct.unpack_from(f"{order}HHLL", tiff, first)
        size = count * _UNITS.get(kind, 0)
        if size > 4 and offset + size > len(tiff):
            return
        copied += size
        if copied > 2 * len(tiff):
            raise _overdone()


def _broken() -> ApiError:
    return ApiError("undecodable", "the image is truncated or damaged; save it anew")


def _overdone() -> ApiError:
    return ApiError("undecodable", "the image has far too many parts, or odd metadata; save it anew without metadata")
