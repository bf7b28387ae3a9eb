"""What an uploaded file must be before anything decodes it; nothing here keeps, logs or fetches an image."""

import re
import warnings
import zlib
from io import BytesIO

from PIL import Image

from raresynth.dataset.images import Pixels, decode_image
from raresynth.errors import DataError
from serving.errors import ApiError
from serving.settings import Settings

FORMATS = ("JPEG", "PNG", "WEBP")
_START = re.compile(rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|RIFF....WEBP", re.DOTALL)
MAX_SCANS = 100
"""Passes of a progressive JPEG; ordinary ones have about ten, and each costs a pass over all pixels."""
_MARKER = re.compile(rb"\xff([^\x00\xd0-\xd7\xff])")
"""A JPEG marker that ends a run of compressed pixels: not an escaped 255, a restart or a fill byte."""
_SCAN, _END, _STANDALONE = 0xDA, 0xD9, frozenset({0x01, *range(0xD0, 0xD9)})


def check_upload(content: bytes, settings: Settings) -> None:
    """Refuse what is not one whole still image of bearable size; reads headers alone.

    Raises:
        ApiError: too_large, wrong_type, animated, too_many_pixels, undecodable or trailing_data.
    """
    if len(content) > settings.max_image_mb * 1e6:
        raise ApiError("too_large", f"the image has more than {settings.max_image_mb:g} MB; send a smaller one")
    if not _START.match(content):
        raise ApiError("wrong_type", "the file is no JPEG, PNG or WebP image; send one of these")
    width, height, kind, frames = _header(content)
    if frames > 1 and kind != "MPO":  # a phone's JPEG may carry a preview as a second image
        raise ApiError("animated", f"the image has {frames} frames; send a single one")
    if width * height > settings.max_megapixels * 1e6:
        most = f"{settings.max_megapixels:g} megapixels"
        raise ApiError("too_many_pixels", f"the image has {width} x {height} pixels; send one of at most {most}")
    end = {"PNG": _png_end, "WEBP": _webp_end}.get(kind, _jpeg_end)(content)
    if kind != "MPO" and content[end:].strip(b"\x00\r\n "):
        raise ApiError("trailing_data", "the file goes on after the image's end; save the image anew")


def decode_upload(content: bytes, resolution: int, settings: Settings) -> Pixels:
    """Check and decode one uploaded image to uint8 (resolution, resolution, 3), upright as its EXIF says.

    Raises:
        ApiError: it is refused or cannot be decoded.
    """
    check_upload(content, settings)
    try:
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
    at, name = 8, b""
    while name != b"IEND":
        length = int.from_bytes(content[at : at + 4], "big")
        name, end = content[at + 4 : at + 8], at + 12 + length
        # PIL decodes on over damaged pixels without a word.
        if end > len(content) or zlib.crc32(content[at + 4 : end - 4]) != int.from_bytes(content[end - 4 : end], "big"):
            raise _broken()
        at = end
    return at


def _webp_end(content: bytes) -> int:
    length = int.from_bytes(content[4:8], "little")
    end = 8 + length + length % 2
    if end > len(content):
        raise _broken()
    return end


def _jpeg_end(content: bytes) -> int:
    at, scans = 2, 0
    while found := _MARKER.search(content, at):
        marker, at = found[1][0], found.end()
        if marker == _END:
            return at
        if marker in _STANDALONE:
            continue
        at += int.from_bytes(content[at : at + 2], "big")
        scans += marker == _SCAN
        if scans > MAX_SCANS:
            raise ApiError("undecodable", f"the image has more than {MAX_SCANS} scans; save it anew")
    raise _broken()


def _broken() -> ApiError:
    return ApiError("undecodable", "the image is truncated or damaged; save it anew")
