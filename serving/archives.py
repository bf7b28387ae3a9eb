"""Synthetic images as a zip archive with a manifest: same order, same bytes."""

import hashlib
import json
import math
import zipfile
from collections.abc import Callable, Iterable
from io import BytesIO
from typing import IO, Any, Literal

import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict

from raresynth.bundle.sampler import PASS, Sampler
from raresynth.dataset.images import Pixels

Format = Literal["png", "jpeg", "npz"]
JPEG_QUALITY = 95

LARGEST = 16
"""Images of a piece at most: what one thread draws of an order before others have their turn."""


class Order(BaseModel):
    """What is asked for."""

    model_config = ConfigDict(frozen=True)

    label: str
    n: int
    seed: int
    truncation: float
    format: Format


def pieces(n: int, threads: int) -> list[range]:
    """Images 0 .. n - 1 in pieces: one for each thread, if these are not too large."""
    step = min(LARGEST, PASS * math.ceil(n / (PASS * threads)))
    return [range(first, min(first + step, n)) for first in range(0, n, step)]


def draw(sampler: Sampler, order: Order, piece: range) -> list[bytes]:
    """Some images of an order: a file each, or for npz the bytes of its pixels."""
    drawn = sampler.generate(order.seed, piece.start, len(piece), order.truncation)
    return _ENCODE[order.format](drawn, sampler, order, piece.start)


def write_archive(
    out: IO[bytes], sampler: Sampler, order: Order, images: Iterable[bytes], lineage: dict[str, Any]
) -> None:
    """Write an order's images as they come from `draw`, then manifest.json.

    Args:
        lineage: what the manifest says of the bundle.
    """
    with zipfile.ZipFile(out, "w") as archive:
        if order.format == "npz":
            entries = _array(archive, images, (order.n, *2 * [sampler.generator.resolution], 3))
        else:
            entries = _files(archive, images, order.format)
        manifest = {
            "synthetic": True,
            **order.model_dump(),
            "generator": sampler.generator.weights_sha256,
            **lineage,
            "images": entries,
        }
        _add(archive, "manifest.json", json.dumps(manifest, indent=2, sort_keys=True).encode())


def _files(archive: zipfile.ZipFile, images: Iterable[bytes], suffix: str) -> list[dict[str, Any]]:
    entries = []
    for index, content in enumerate(images):
        name = f"{index:06d}.{suffix}"
        _add(archive, name, content)
        entries.append({"index": index, "path": name, "sha256": hashlib.sha256(content).hexdigest()})
    return entries


def _array(archive: zipfile.ZipFile, images: Iterable[bytes], shape: tuple[int, ...]) -> list[dict[str, Any]]:
    """One file images.npz that holds `images`, uint8 of a shape; what is hashed are its bytes."""
    digest = hashlib.sha256()
    with (
        archive.open(zipfile.ZipInfo("images.npz"), "w", force_zip64=True) as file,
        zipfile.ZipFile(file, "w") as arrays,
        arrays.open(zipfile.ZipInfo("images.npy"), "w", force_zip64=True) as array,
    ):
        np.lib.format.write_array_header_1_0(array, {"descr": "|u1", "fortran_order": False, "shape": shape})
        for pixels in images:
            array.write(pixels)
            digest.update(pixels)
    return [{"first": 0, "n": shape[0], "path": "images.npz", "pixels_sha256": digest.hexdigest()}]


def _pngs(images: Pixels, sampler: Sampler, order: Order, first: int) -> list[bytes]:
    return sampler.pngs(images, order.seed, first, order.truncation)


def _jpegs(images: Pixels, sampler: Sampler, order: Order, first: int) -> list[bytes]:
    origin = {"generator": sampler.generator.weights_sha256, "label": order.label, "seed": order.seed}
    files = []
    for index, pixels in enumerate(images, first):
        comment = json.dumps({"synthetic": True, **origin, "index": index, "truncation": order.truncation}).encode()
        buffer = BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0, comment=comment)
        files.append(buffer.getvalue())
    return files


def _raw(images: Pixels, *_: object) -> list[bytes]:
    return [pixels.tobytes() for pixels in images]


_ENCODE: dict[Format, Callable[[Pixels, Sampler, Order, int], list[bytes]]] = {
    "png": _pngs,
    "jpeg": _jpegs,
    "npz": _raw,
}


def _add(archive: zipfile.ZipFile, name: str, content: bytes) -> None:
    # A fixed date and no compression: the images are compressed already, and equal orders give equal bytes.
    archive.writestr(zipfile.ZipInfo(name), content)
