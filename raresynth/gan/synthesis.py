"""The images that balance a class: drawn, sieved, and written with where they come from.

Image i depends on generator, seed, truncation and i alone, so that a class can be drawn in parts, by several tasks at
once, and the result is the same bytes.
"""

import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import pandas as pd

from raresynth.config import SynthesisConfig
from raresynth.dataset.manifest import SYNTHETIC_COLUMNS
from raresynth.errors import CheckpointError
from raresynth.gan.latents import CHUNK
from raresynth.gan.png import Pixels, Provenance, encode_png
from raresynth.gan.sampling import generate, load_generator
from raresynth.lineage import Report, new_dir, sha256_file, write_json, write_report, write_text
from raresynth.progress import progress

MOST_DRAWN = 8
"""At most so many images are drawn for each one that is wanted."""
VERDICTS = "verdicts.json"

Rejection = Literal["atypical", "near_copy"]


class Sieve(Protocol):
    """Tells which images are not to be used. `quality` has one; `gan` does not import it."""

    def judge(self, images: Pixels) -> Sequence[Rejection | None]:
        """Why each image is rejected, or None."""


class SynthesisReport(Report):
    """What was synthesised for one class."""

    label: str
    n_images: int
    n_wanted: int
    n_drawn: int
    rejected: dict[Rejection, int]
    resolution: int
    seed: int
    truncation: float
    generator: str
    """SHA-256 of the generator's weights."""
    manifest_sha256: str


class Chunk(NamedTuple):
    """CHUNK images that were drawn one after the other."""

    verdicts: Sequence[Rejection | None]
    """Why each is rejected."""
    pngs: Sequence[bytes | None]
    """The file of each that is not."""


class Drawing:
    """Draws a class chunk by chunk.

    Attributes:
        label: of the class.
        config: seed and truncation, among others.
        generator: SHA-256 of the generator's weights.
        resolution: side of the images in pixels.
    """

    def __init__(
        self, generator_dir: Path, label: str, config: SynthesisConfig, device: str, sieve: Sieve | None
    ) -> None:
        """Load the generator.

        Args:
            generator_dir: what finetune left for the class, or what pretrain left: a universal generator that knows no
                classes then draws whatever it does.

        Raises:
            CheckpointError: `generator_dir` holds no generator, or that of another class.
        """
        self._network, meta = load_generator(generator_dir, device, label)
        self._sieve = sieve
        self.label, self.config = label, config
        self.generator: str = meta["weights_sha256"]
        self.resolution: int = meta["architecture"]["resolution"]

    def chunk(self, first: int, pool: Executor) -> Chunk:
        """Images first .. first + CHUNK - 1; `first` is a multiple of CHUNK."""
        pixels = generate(self._network, self.config.seed, range(first, first + CHUNK), self.config.truncation)
        verdicts = self._sieve.judge(pixels) if self._sieve else [None] * CHUNK
        kept = [row for row, why in enumerate(verdicts) if why is None]
        pngs = dict(zip(kept, pool.map(lambda row: self._png(first + row, pixels[row]), kept), strict=True))
        return Chunk(verdicts, [pngs.get(row) for row in range(CHUNK)])

    def _png(self, index: int, pixels: Pixels) -> bytes:
        origin = Provenance(self.generator, self.label, self.config.seed, index, self.config.truncation)
        return encode_png(pixels, origin)


def draw_part(drawing: Drawing, n: int, number: int, count: int, out_dir: Path) -> int:
    """Draw every `count`-th chunk of a class, from chunk `number` on, until it has its share of `n` images.

    Leaves the images that passed the sieve below images/, and verdicts.json: first index of a chunk -> its verdicts.

    Returns:
        number of images that passed.
    """
    verdicts: dict[int, Sequence[Rejection | None]] = {}
    share, kept = math.ceil(n / count), 0
    what = f"draw {drawing.label} {number + 1} of {count}"
    with new_dir(out_dir) as folder, ThreadPoolExecutor(os.cpu_count()) as pool, progress(what, share, "images") as add:
        (folder / "images").mkdir()
        for first in range(number * CHUNK, MOST_DRAWN * n, count * CHUNK):
            if kept >= share:
                break
            chunk = drawing.chunk(first, pool)
            verdicts[first] = chunk.verdicts
            passed = [(first + row, png) for row, png in enumerate(chunk.pngs) if png is not None]
            for index, png in passed:
                (folder / _name(index)).write_bytes(png)
            kept += len(passed)
            add(len(passed))
        write_json(folder / VERDICTS, verdicts)
    return kept


def synthesize(drawing: Drawing, n: int, out_dir: Path, parts: Sequence[Path] = ()) -> SynthesisReport:
    """Take a class's images in order until `n` have passed the sieve: PNG files beside manifest.csv and report.json.

    Image 0 is taken first. After `MOST_DRAWN` times `n` images it is over; the report then has fewer than were wanted.
    `out_dir` appears when everything in it is written; what was there before is replaced.

    Args:
        parts: what `draw_part` left of the class; a chunk that is in none of them is drawn here.

    Raises:
        CheckpointError: a part is missing or damaged.
    """
    drawn = {first: (folder, verdicts) for folder in parts for first, verdicts in _verdicts(folder).items()}
    rows: list[dict[str, object]] = []
    n_drawn = 0
    rejected: Counter[Rejection] = Counter()
    since: Counter[Rejection] = Counter()
    what = f"synthesize {drawing.label}"
    with new_dir(out_dir) as folder:
        (folder / "images").mkdir()
        with ThreadPoolExecutor(os.cpu_count()) as pool, progress(what, n, "images") as advance:
            while len(rows) < n and n_drawn < MOST_DRAWN * n:
                before = len(rows)
                chunk = _read_chunk(n_drawn, *drawn[n_drawn]) if n_drawn in drawn else drawing.chunk(n_drawn, pool)
                for why, png in zip(*chunk, strict=True):
                    if why is not None:
                        since[why] += 1
                        rejected[why] += 1
                    elif png is not None:
                        (folder / _name(n_drawn)).write_bytes(png)
                        rows.append(_row(drawing, n_drawn, png, since))
                        since = Counter()
                    n_drawn += 1
                    if len(rows) == n:
                        break
                advance(len(rows) - before)
        manifest = pd.DataFrame(rows, columns=list(SYNTHETIC_COLUMNS))
        write_text(folder / "manifest.csv", manifest.to_csv(index=False, lineterminator="\n"))
        report = SynthesisReport(
            label=drawing.label,
            n_images=len(rows),
            n_wanted=n,
            n_drawn=n_drawn,
            rejected={why: rejected[why] for why in ("atypical", "near_copy")},
            resolution=drawing.resolution,
            seed=drawing.config.seed,
            truncation=drawing.config.truncation,
            generator=drawing.generator,
            manifest_sha256=sha256_file(folder / "manifest.csv"),
        )
        write_report(folder / "report.json", report)
    return report


def _verdicts(folder: Path) -> dict[int, Sequence[Rejection | None]]:
    path = folder / VERDICTS
    try:
        return {int(first): verdicts for first, verdicts in json.loads(path.read_text(encoding="utf-8")).items()}
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); run the stage draw again") from error


def _read_chunk(first: int, folder: Path, verdicts: Sequence[Rejection | None]) -> Chunk:
    pngs = [None if why else (folder / _name(first + row)).read_bytes() for row, why in enumerate(verdicts)]
    return Chunk(verdicts, pngs)


def _name(index: int) -> str:
    return f"images/{index:06d}.png"


def _row(drawing: Drawing, index: int, png: bytes, rejected: Mapping[Rejection, int]) -> dict[str, object]:
    """An image's row of the manifest."""
    return {
        "image_id": f"synthetic-{drawing.label}-{drawing.config.seed}-{index:06d}",
        "path": f"{drawing.label}/{_name(index)}",
        "label": drawing.label,
        "generator": drawing.generator,
        "seed": drawing.config.seed,
        "index": index,
        "truncation": drawing.config.truncation,
        "sha256": hashlib.sha256(png).hexdigest(),
        "width": drawing.resolution,
        "height": drawing.resolution,
        "rejected_atypical": rejected["atypical"],
        "rejected_near_copy": rejected["near_copy"],
    }
