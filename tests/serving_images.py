"""Uploads as the service's tests send them, good and bad."""

import io
import struct
import zipfile
import zlib

import numpy as np
from PIL import Image


def encoded(kind: str = "JPEG", size: tuple[int, int] = (48, 40), seed: int = 0, **options: object) -> bytes:
    """A smooth random image."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(buffer, kind, **options)
    return buffer.getvalue()


def animated(kind: str) -> bytes:
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue")]
    buffer = io.BytesIO()
    frames[0].save(buffer, kind, save_all=True, append_images=frames[1:])
    return buffer.getvalue()


def huge_png(width: int, height: int) -> bytes:
    """A PNG whose header promises far more pixels than its few bytes."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = zlib.compress(bytes(10**6))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def archive() -> bytes:
    """A zip archive, as a polyglot file carries one behind its image."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("payload", "x" * 100)
    return buffer.getvalue()


def bad_uploads() -> dict[str, tuple[bytes, str]]:
    """Name -> a file that must be refused, and the code it is refused with; at 1 MB and 2 megapixels."""
    jpeg, png, webp = encoded("JPEG"), encoded("PNG"), encoded("WEBP")
    return {
        "empty": (b"", "wrong_type"),
        "text": (b"no image", "wrong_type"),
        "pdf": (b"%PDF-1.7\n" + bytes(100), "wrong_type"),
        "svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "wrong_type"),
        "tiff": (encoded("TIFF"), "wrong_type"),
        "gif": (animated("GIF"), "wrong_type"),
        "animated webp": (animated("WEBP"), "animated"),
        "animated png": (animated("PNG"), "animated"),
        "truncated jpeg": (jpeg[: len(jpeg) // 2], "undecodable"),
        "truncated png": (png[: len(png) // 2], "undecodable"),
        "truncated webp": (webp[: len(webp) // 2], "undecodable"),
        "jpeg and zip": (jpeg + archive(), "trailing_data"),
        "jpeg and zip with a marker": (jpeg + archive() + b"\xff\xd9", "trailing_data"),
        "jpeg with a preview and zip": (animated("MPO") + archive(), "trailing_data"),
        "png and zip": (png + archive(), "trailing_data"),
        "webp and zip": (webp + archive(), "trailing_data"),
        "bomb": (huge_png(30_000, 30_000), "too_many_pixels"),
        "100 megapixels": (huge_png(10_000, 10_000), "too_many_pixels"),
        "damaged png": (png[:60] + bytes(20) + png[80:], "undecodable"),
        "large": (jpeg + bytes(1_100_000), "too_large"),
    }
