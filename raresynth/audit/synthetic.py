"""Synthetic images: what is written in them, and whether the generator that they name makes them again."""

import hashlib
import io
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from raresynth.audit.findings import Link
from raresynth.bundle.contents import open_bundle
from raresynth.bundle.sampler import Sampler
from raresynth.dataset.images import Pixels
from raresynth.dataset.manifest import read_synthetic
from raresynth.errors import CheckpointError, DataError
from raresynth.gan.latents import CHUNK
from raresynth.gan.png import Provenance, read_provenance, written

ROUNDING = 1
"""Levels of 255 by which a pixel may differ: a run's images were drawn by torch, a bundle's by onnxruntime."""
NEEDED = ("path", "label", "generator", "seed", "index", "truncation", "sha256")
"""Columns of a manifest by which its images can be checked."""


class Generators:
    """The generators of a bundle, to make images again."""

    def __init__(self, bundle: Path) -> None:
        """Open a bundle.

        Raises:
            CheckpointError: this is no bundle, or it was changed.
        """
        self.bundle = open_bundle(bundle)
        self._sampler = lru_cache(lambda label: Sampler(bundle, label, self.bundle))
        self._chunk = lru_cache(maxsize=1)(self._draw_chunk)

    def check(self, link: Link, what: str, said: Provenance, content: bytes) -> None:
        """Note whether an image is the one that its provenance says."""
        try:
            generator = self._sampler(said.label).generator.weights_sha256
        except CheckpointError as error:
            link.check(what, False, str(error))
            return
        if generator != said.generator:
            link.check(what, False, f"the bundle's generator of {said.label} is {generator}")
            return
        again = self._chunk(said.label, said.seed, said.index - said.index % CHUNK, said.truncation)[said.index % CHUNK]
        try:
            pixels = decode(content)
        except Exception as error:  # as above
            link.check(what, False, f"its pixels cannot be read: {error}")
            return
        same = pixels.shape == again.shape and np.abs(pixels.astype(int) - again.astype(int)).max() <= ROUNDING
        link.check(what, bool(same), f"the generator makes another image of seed {said.seed}, index {said.index}")

    def _draw_chunk(self, label: str, seed: int, first: int, truncation: float) -> Pixels:
        pixels: Pixels = self._sampler(label).generate(seed, first, CHUNK, truncation)
        return pixels


def audit_batch(folder: Path, generators: Generators) -> Link:
    """Check a folder of synthetic images beside a manifest.csv, as `generate` and `synthesize` leave it.

    Raises:
        DataError: the folder has no manifest of synthetic images.
    """
    link = Link(f"synthetic images {folder}")
    table = read_synthetic(folder / "manifest.csv", "generate")
    if missing := [column for column in NEEDED if column not in table]:
        raise DataError(
            f"{folder / 'manifest.csv'} lists no synthetic images: it has no {', '.join(missing)}; name others"
        )
    root = root_of(folder, table)
    for row in table.to_dict("records"):
        name, path = str(row["path"]), root / str(row["path"])
        said = written(row)
        content = path.read_bytes() if path.is_file() else b""
        if hashlib.sha256(content).hexdigest() != row["sha256"]:
            link.check(name, False, "was changed" if content else "is missing")
        elif said is None:
            link.check(name, False, "its row in manifest.csv names no generator, seed, index and truncation")
        elif provenance(content) != said:
            link.check(name, False, "says another origin than manifest.csv does")
        else:
            generators.check(link, name, said, content)
    listed = {(root / path).resolve() for path in table["path"]}
    for path in sorted(path for path in folder.rglob("*.png") if path.resolve() not in listed):
        link.check(path.relative_to(folder).as_posix(), False, "is not in manifest.csv")
    return _summed_up(link, len(table))


def root_of(folder: Path, table: pd.DataFrame) -> Path:
    """Where the paths in a batch's manifest begin."""
    # synthesize names its files from the folder above, where all classes lie side by side.
    return folder if any((folder / path).exists() for path in table["path"]) else folder.parent


def provenance(content: bytes) -> Provenance | None:
    """What is written in a PNG file; None where nothing is, or it is no image."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            return read_provenance(image)
    except Exception:  # a broken or hostile file can raise anything in PIL's parsers
        return None


def decode(content: bytes) -> Pixels:
    """Pixels of an image that has a provenance."""
    with Image.open(io.BytesIO(content)) as image:
        return np.asarray(image.convert("RGB"))


def _summed_up(link: Link, n: int) -> Link:
    """The checks that failed, and one line for those that did not: there may be thousands."""
    link.checks = [check for check in link.checks if check.status == "broken"]
    what = f"{n} images are as manifest.csv has them, and the bundle's generators make them again"
    link.check(what, not link.checks, f"{len(link.checks)} are not")
    return link
