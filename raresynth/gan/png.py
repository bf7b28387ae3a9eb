"""Synthetic images as files: from network output to pixels, and to PNG that names its origin. Knows no torch."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from PIL.PngImagePlugin import PngInfo

Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Provenance:
    """Where a synthetic image comes from."""

    generator: str
    """SHA-256 of the generator's weights."""
    label: str
    seed: int
    index: int
    truncation: float = 1.0


def to_pixels(output: npt.NDArray[np.float32]) -> Pixels:
    """Network output (n, 3, R, R) in [-1, 1] as uint8 (n, R, R, 3), rounded to nearest; clipped to 0-255."""
    levels = np.clip(np.rint((output + np.float32(1.0)) * np.float32(127.5)), 0, 255)
    return np.ascontiguousarray(levels.transpose(0, 2, 3, 1).astype(np.uint8))


def encode_png(pixels: Pixels, provenance: Provenance) -> bytes:
    """One image (R, R, 3) as PNG with text chunks: generator, label, seed, index, truncation and `synthetic`: true."""
    text = PngInfo()
    for key, value in {**vars(provenance), "synthetic": True}.items():
        text.add_text(key, value if isinstance(value, str) else json.dumps(value))
    buffer = BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", pnginfo=text, compress_level=1)
    return buffer.getvalue()


def read_provenance(image: Image.Image) -> Provenance | None:
    """What `encode_png` wrote into an image; None where there is nothing, or nothing that makes sense."""
    return written(image.info)


def written(text: Mapping[Any, Any]) -> Provenance | None:
    """The provenance that stands in an image's text or a manifest's row; None where none does that makes sense."""
    try:
        said = Provenance(
            text["generator"], text["label"], int(text["seed"]), int(text["index"]), float(text["truncation"])
        )
    except (KeyError, TypeError, ValueError, OverflowError):
        return None
    return said if 0 <= said.seed < 2**63 and 0 <= said.index < 2**63 and 0 < said.truncation <= 1 else None
