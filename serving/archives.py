"""Synthetic images as a zip archive with a manifest: same order, same bytes."""

import hashlib
import json
import threading
import zipfile
from collections.abc import Iterator
from io import BytesIO
from typing import IO, Any, Literal

import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict

from raresynth.bundle.sampler import Sampler
from raresynth.dataset.images import Pixels

Format = Literal["png", "jpeg", "npz"]
STEP = 16
"""Images drawn at a time: one pass of the generator, after which the work may be dropped."""
JPEG_QUALITY = 95


class Order(BaseModel):
    """What is asked for."""

    model_config = ConfigDict(frozen=True)

    label: str
    n: int
    seed: int
    truncation: float
    format: Format


class Dropped(Exception):
    """Nobody waits for the archive any more."""


def write_archive(
    out: IO[bytes], sampler: Sampler, order: Order, lineage: dict[str, Any], dropped: threading.Event
) -> None:
    """Write the archive of images 0 .. n - 1 of the seed, then manifest.json, in constant memory.

    Args:
        lineage: what the manifest says of the bundle.

    Raises:
        Dropped: `dropped` was set.
    """
    with zipfile.ZipFile(out, "w") as archive:
        chunks = _chunks(sampler, order, dropped)
        images = _arrays(archive, order, chunks) if order.format == "npz" else _files(archive, sampler, order, chunks)
        manifest = {
            "synthetic": True,
            **order.model_dump(),
            "generator": sampler.generator.weights_sha256,
            **lineage,
            "images": images,
        }
        _add(archive, "manifest.json", json.dumps(manifest, indent=2, sort_keys=True).encode())


def _chunks(sampler: Sampler, order: Order, dropped: threading.Event) -> Iterator[tuple[int, Pixels]]:
    for first in range(0, order.n, STEP):
        if dropped.is_set():
            raise Dropped
        yield first, sampler.generate(order.seed, first, min(STEP, order.n - first), order.truncation)


def _files(
    archive: zipfile.ZipFile, sampler: Sampler, order: Order, chunks: Iterator[tuple[int, Pixels]]
) -> list[dict[str, Any]]:
    entries = []
    for first, chunk in chunks:
        for index, pixels in enumerate(chunk, first):
            name = f"{index:06d}.{order.format}"
            content = (
                sampler.png(pixels, order.seed, index, order.truncation)
                if order.format == "png"
                else _jpeg(pixels, {"synthetic": True, **_provenance(sampler, order, index)})
            )
            _add(archive, name, content)
            entries.append({"index": index, "path": name, "sha256": hashlib.sha256(content).hexdigest()})
    return entries


def _arrays(archive: zipfile.ZipFile, order: Order, chunks: Iterator[tuple[int, Pixels]]) -> list[dict[str, Any]]:
    """One file images.npz that holds `images`, uint8 (n, R, R, 3); what is hashed are its bytes."""
    digest = hashlib.sha256()
    with (
        archive.open(zipfile.ZipInfo("images.npz"), "w", force_zip64=True) as file,
        zipfile.ZipFile(file, "w") as arrays,
        arrays.open(zipfile.ZipInfo("images.npy"), "w", force_zip64=True) as array,
    ):
        for first, pixels in chunks:
            if first == 0:
                shape = (order.n, *pixels.shape[1:])
                np.lib.format.write_array_header_1_0(array, {"descr": "|u1", "fortran_order": False, "shape": shape})
            array.write(pixels.tobytes())
            digest.update(pixels.tobytes())
    return [{"first": 0, "n": order.n, "path": "images.npz", "pixels_sha256": digest.hexdigest()}]


def _provenance(sampler: Sampler, order: Order, index: int) -> dict[str, Any]:
    origin = {"generator": sampler.generator.weights_sha256, "label": order.label, "seed": order.seed}
    return {**origin, "index": index, "truncation": order.truncation}


def _jpeg(pixels: Pixels, provenance: dict[str, Any]) -> bytes:
    buffer = BytesIO()
    comment = json.dumps(provenance).encode()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0, comment=comment)
    return buffer.getvalue()


def _add(archive: zipfile.ZipFile, name: str, content: bytes) -> None:
    # A fixed date and no compression: the images are compressed already, and equal orders give equal bytes.
    archive.writestr(zipfile.ZipInfo(name), content)
